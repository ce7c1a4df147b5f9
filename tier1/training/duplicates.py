"""Which texts have come before, by their BLAKE2b digests: 16 bytes of memory per text, for a moment twice that.

Sorted runs of digests, each more than twice as long as the next, so that there are few and a digest is merged rarely
(a log-structured merge tree: O'Neil et al., Acta Informatica 33, 1996).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

DIGEST = np.dtype("S16")


def digests_of(texts: Iterable[str]) -> np.ndarray:
    """Return S16 [n], the digests of texts as they are: nothing is normalised."""
    return np.array([hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest() for text in texts], dtype=DIGEST)


class Seen:
    """Digests of all texts so far."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Return bool [n]: which of the texts come for the first time; remember them."""
        new = np.zeros(len(digests), dtype=bool)
        new[np.unique(digests, return_index=True)[1]] = True
        for run in self._runs:
            new &= run[np.minimum(np.searchsorted(run, digests), len(run) - 1)] != digests
        run = np.sort(digests[new])
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        if len(run):
            self._runs.append(run)
        return new

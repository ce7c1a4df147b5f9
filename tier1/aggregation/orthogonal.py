"""Keep device folds out of the directions in which earlier ones moved an expert.

    D_v = W_v − W_{v−1}                           of the last n folds v on the way to the parent, from the chain's blobs
    Q   = leading right singular vectors of the D_v, one below the other, each scaled to norm 1         [d_in, ≤ k]
    Δ′  = Δ·(I − λ·Q·Qᵀ)

An input in the span of Q passes the new fold as if it were not there (λ = 1), so what the earlier folds taught about
it stays. O-LoRA (Wang et al. 2023, arXiv 2310.14152, eq. 7) asks the trainer for it, by a penalty on A_old·A_newᵀ; here
it is done to what arrives: Δ = Σ ω s B·A, so it is enough to project every A. Rules, clips and the probe see updates as
they were sent.

Q comes from subspace iteration (Halko et al. 2011, arXiv 0909.4061, alg. 4.4) from a fixed start, so that its cost is
that of a few thin products and not of an SVD. Which directions are found is decided in fp32, as precise as W is; that
they are orthonormal, their energies and the projection are fp64. Directions with less than `FLOOR` of the largest
energy are rounding of W to fp32 and left out. All of it on one thread and a function of the chain alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import islice

import numpy as np
import torch

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import SnapshotError
from fednested_lib.fixed_a import fixed_rows
from fednested_lib.snapshot import SLICE_TENSOR, read_slice, slice_key
from tier1.aggregation.fold import WeightedUpdate
from tier1.versions.settings import OrthogonalSettings
from tier1.versions.state import VersionView

STEPS = 4
SPARE = 8  # directions that are iterated and not kept: the kept ones converge sooner
FLOOR = 1e-9


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What a fold keeps clear of.

    Args:
        folds: per protected fold, newest first: its version, and slice key → digest before and after it.
        settings: how much of it.
        store: holds the slices.
    """

    folds: Sequence[tuple[int, Mapping[str, str], Mapping[str, str]]]
    settings: OrthogonalSettings
    store: BlobStore

    def projected(self, updates: Iterable[WeightedUpdate]) -> list[WeightedUpdate]:
        """Return the updates with every A projected when it is read; fp64 where something is protected.

        Reading raises SnapshotError when a slice of a protected fold is missing or corrupt.
        """

        @lru_cache(maxsize=1)  # a fold goes slice by slice
        def basis(param: str, expert: int) -> torch.Tensor | None:
            return self.basis(slice_key(param, expert))

        def clear(update: WeightedUpdate) -> WeightedUpdate:
            def factors(param: str, expert: int) -> tuple[np.ndarray, np.ndarray]:
                a, b = update.factors(param, expert)
                protected = basis(param, expert)
                return (a if protected is None else project(a, protected, self.settings.strength)), b

            return replace(update, factors=factors)

        return [clear(update) for update in updates]

    def basis(self, key: str) -> torch.Tensor | None:
        """Return Q of a slice, None where no protected fold moved it.

        Raises:
            SnapshotError: a slice of a protected fold is missing or corrupt.
        """
        moves = [
            self._read(key, version, after[key]) - self._read(key, version, before[key])
            for version, before, after in self.folds
            if before[key] != after[key]
        ]
        return leading(moves, self.settings.rank)

    def _read(self, key: str, version: int, digest: str) -> torch.Tensor:
        try:
            return torch.tensor(read_slice(key, digest, self.store)[SLICE_TENSOR])
        except SnapshotError as error:
            raise SnapshotError(
                error.reason,
                f"{error}; aggregation.orthogonal protects version {version}: run fednested tier1 replay --version "
                f"{version}",
            ) from error


def protection(parent: VersionView, settings: OrthogonalSettings | None, store: BlobStore) -> Protection | None:
    """Return what a fold on `parent` keeps clear of; None if that is off."""
    if settings is None:
        return None
    folds = (view for view in parent.lineage() if view.accepted)
    return Protection(
        folds=[(view.version, view.parent.blobs, view.blobs) for view in islice(folds, settings.versions)],
        settings=settings,
        store=store,
    )


def project(rows: np.ndarray, basis: torch.Tensor, strength: float) -> np.ndarray:
    """Return rows·(I − λ·Q·Qᵀ), fp64.

    Args:
        rows: [r, d_in].
        basis: Q, orthonormal, fp64 [d_in, k].
        strength: λ in (0, 1].
    """
    a = torch.tensor(rows, dtype=torch.float64)
    return (a - strength * ((a @ basis) @ basis.T)).numpy()


def leading(moves: Sequence[torch.Tensor], rank: int) -> torch.Tensor | None:
    """Return the directions [d_in, ≤ rank] to which moves, each scaled to norm 1, react most; None without any.

    Args:
        moves: D_v, [d_out, d_in] each; what is zero does not count.
        rank: k.
    """
    scaled = [move.float().div(move.double().norm()) for move in moves if move.any()]
    if not scaled:
        return None
    q = _start(moves[0].shape[1], rank)
    for _ in range(STEPS):
        thin = q.float()
        q = torch.linalg.qr(sum(((move @ thin).T @ move).double() for move in scaled).T).Q
    energies, turn = torch.linalg.eigh(sum(_gram(move.double() @ q) for move in scaled))
    strongest = [i for i in reversed(range(len(energies))) if energies[i] > FLOOR * energies[-1]][:rank]
    return q @ turn[:, strongest]


def _gram(reaction: torch.Tensor) -> torch.Tensor:
    return reaction.T @ reaction


@cache
def _start(d_in: int, rank: int) -> torch.Tensor:
    """Return a fixed orthonormal block [d_in, ≤ rank + SPARE]."""
    width = min(d_in, rank + SPARE)
    return torch.tensor(fixed_rows(0, "orthogonal", (0,), width, d_in)[0].T, dtype=torch.float64).contiguous()

"""Packed rows: documents that do not look at each other, what that costs, and weights of datasets."""

from __future__ import annotations

import time
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.registry import Reading, figure

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SEED, REPEATS = 20261123, 7
ROWS, SEQ_LEN, MEAN_DOCUMENT = 8, 512, 64
END = 0


@figure("training.document_masks_equal", unit="1", bound="<= 1e-6")
def document_masks_equal() -> float:
    """Largest relative difference of the loss of masked packed rows from their documents' alone, three families."""
    from tests.tier1.training.documents_alone import END, FAMILIES, apart_from_alone, enlarged, packed_rows

    rows, found = packed_rows(), []
    for family in FAMILIES:
        model = enlarged(family)
        if apart_from_alone(model, rows, None) <= 1e-4:
            raise RuntimeError(f"{family}: without masks the loss is the same, so nothing is shown")
        found.append(apart_from_alone(model, rows, END))
    return max(found)


@figure("training.mixture_error", unit="rows", bound="<= 1")
def mixture_error() -> float:
    """Most rows that a dataset is from its weight's share after any of 2000 rows, 100 weightings of 2 to 12."""
    from tier1.training.mixture import turns

    rng, worst = np.random.default_rng(SEED), 0.0
    for _ in range(100):
        weights = (10 ** rng.uniform(-3, 2, size=rng.integers(2, 13))).tolist()
        drawn = np.fromiter(islice(turns(weights), 2000), np.int64)
        counts = np.cumsum(drawn[:, None] == np.arange(len(weights)), axis=0)
        due = np.arange(1, 2001)[:, None] * (np.array(weights) / sum(weights))
        worst = max(worst, float(np.abs(counts - due).max()))
    return worst


@figure("training.tokens_across", unit="tokens/s", cls="full")
def tokens_across() -> Reading:
    """Tokens per second of one thread, the demo's model, rows of 512 tokens read across documents; median of 7."""
    return _speeds()[0]


@figure("training.tokens_masked", unit="tokens/s", cls="full")
def tokens_masked() -> Reading:
    """Tokens per second on the same rows in turn with them, documents of about 64 tokens masked; median of 7."""
    return _speeds()[1]


@cache
def _speeds() -> tuple[Reading, Reading]:
    """Time both in turn, once the masked loss is that of the documents alone; a step of each warms up."""
    from tests.tier1.training.documents_alone import mean_alone
    from tier1.training.backends import TorchBackend
    from tier1.training.model import TINY_MIXTRAL, initial_model
    from tier1.training.settings import TrainSettings

    rows = _rows()
    steps: list[Callable[[Tensor, float], float]] = []
    for end in (None, END):
        model, backend = initial_model("mixtral", TINY_MIXTRAL, 0), TorchBackend()
        alone = mean_alone(model.eval(), rows) if end is not None else None
        backend.prepare(model, TrainSettings(steps=1, batch_size=ROWS, document_end=end), "mixtral")
        loss = backend.step(rows, 1.0)
        if alone is not None and abs(loss - alone) > 1e-5 * alone:
            raise RuntimeError(f"masked loss is {loss}, that of the documents alone {alone}")
        steps.append(backend.step)
    speeds: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for step, found in zip(steps, speeds, strict=True):
            began = time.perf_counter()
            step(rows, 1.0)
            found.append(ROWS * SEQ_LEN / (time.perf_counter() - began))
    return Reading.of(speeds[0]), Reading.of(speeds[1])


def _rows() -> Tensor:
    import torch

    rng = np.random.default_rng(SEED)
    rows = rng.integers(1, 1024, size=(ROWS, SEQ_LEN + 1))
    rows[rng.random(rows.shape) < 1 / MEAN_DOCUMENT] = END
    return torch.from_numpy(rows)

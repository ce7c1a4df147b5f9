"""Gram matrices of spooled updates, an expert at a time: one expert's factors in memory, whatever the model's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add

import numpy as np

from fednested_lib.blobs import BlobStore
from fednested_lib.partition import expert_param
from fednested_lib.snapshot import SLICE_TENSOR, read_slice, slice_key
from tier1.aggregation.fold import WeightedUpdate, one_thread
from tier1.aggregation.gram import Gram, matrix_gram
from tier1.aggregation.weights import Expert, Grams

DenseRoot = Callable[[str, int], "np.ndarray | None"]  # (parameter, expert) -> [d_out, d_in]; None: zero there


def spooled_grams(
    updates: Sequence[WeightedUpdate], clips: Sequence[float], params: Sequence[str], root: DenseRoot | None = None
) -> Grams:
    """Return the Gram engine of a buffer.

    Args:
        updates: in canonical order; their weights are not read.
        clips: per update, k_d; part of the scale before products are made, so that an update of huge norm costs the
            others no digits.
        params: names of the model's fused expert parameters; an expert's Gram is the sum over those of its layer.
        root: trusted dense direction.
    """
    by_layer: dict[int, list[str]] = {}
    for param in sorted(params):
        by_layer.setdefault(expert_param(param)[0], []).append(param)

    def gram_of(experts: Sequence[Expert], indices: Sequence[int]) -> Gram:
        places = [(param, expert) for layer, expert in experts for param in by_layer[layer]]
        directions = {} if root is None else {place: root(*place) for place in places}
        rooted = any(direction is not None for direction in directions.values())
        with one_thread():
            parts = [
                matrix_gram(
                    [(clips[i] * updates[i].scale, *updates[i].factors(*place)) for i in indices],
                    _direction(updates[indices[0]], place, directions[place]) if rooted else None,
                )
                for place in places
            ]
        return reduce(add, parts)

    return gram_of


def dense_root(blobs: Mapping[str, str], payloads: BlobStore) -> DenseRoot:
    """Return the dense delta of a tier-1 run as a root.

    Args:
        blobs: slice key → digest in `payloads`; slices that did not change are absent.
        payloads: the archive.
    """

    def read(param: str, expert: int) -> np.ndarray | None:
        key = slice_key(param, expert)
        return read_slice(key, blobs[key], payloads)[SLICE_TENSOR] if key in blobs else None

    return read


def _direction(update: WeightedUpdate, place: tuple[str, int], found: np.ndarray | None) -> np.ndarray:
    if found is not None:
        return found
    a, b = update.factors(*place)
    return np.zeros((b.shape[0], a.shape[1]), np.float32)

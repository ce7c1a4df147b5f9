"""The Fisher information that a version carries: what later core updates must not move much (EWC).

    F_{n+1} = d · F_n + Σ_c F_c        online EWC, arXiv:1805.06370; d is the mean of the runs' decays

F_c is what a tier-1 training run with EWC found on its own text (`tier1/training/safeguards.py`). Without that text
nobody finds it again, so it is an input, signed and archived like the run's delta. The sum is part of the fold, slice
by slice in fp64, rounded to fp32 once: it stands in the manifest, is replayed, and follows head like the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import PayloadError
from fednested_lib.snapshot import encode_blob, read_slice
from tier1.aggregation.dense import LARGEST, within


def fold_fisher(
    parent: Mapping[str, str],
    runs: Sequence[tuple[float, Mapping[str, str]]],
    *,
    weights: Mapping[str, str],
    store: BlobStore,
    archive: BlobStore,
) -> dict[str, str]:
    """Add the Fisher information of a round of runs to what the parent carries.

    Args:
        parent: slice key → digest of the parent's; empty: it has none.
        runs: of those that have some, in canonical order: decay 0..1, and slice key → digest in `archive`.
        weights: slice key → digest of the parent's weights, which say names and shapes.
        store: holds the parent's blobs and receives the new ones.
        archive: holds the runs' blobs.

    Returns:
        Slice key → digest; the parent's where no run has any.

    Raises:
        PayloadError: a run's does not fit the model, or is not within the bounds.
        SnapshotError: a blob is missing or corrupt.
        StorageError: the store is full.
    """
    if not runs:
        return dict(parent)
    decay = sum(own for own, _ in runs) / len(runs)
    for _, fisher in runs:
        _require_whole(fisher, weights)
    folded = {}
    for key in sorted(weights):
        before = read_slice(key, parent[key], store) if key in parent else {}
        total = {name: decay * array.astype(np.float64) for name, array in before.items()}
        shapes = {name: array.shape for name, array in read_slice(key, weights[key], store).items()}
        for _, fisher in runs:
            for name, array in _checked(key, fisher, shapes, archive).items():
                total[name] = total.get(name, 0.0) + array.astype(np.float64)
        folded[key] = store.put(encode_blob({name: array.astype(np.float32) for name, array in total.items()}))
    return folded


def require_fisher(
    fisher: Mapping[str, str], shapes: Mapping[str, Mapping[str, tuple[int, ...]]], archive: BlobStore
) -> None:
    """Check that one run's Fisher information can be added: none, or that of every slice, which fits, in 0..`LARGEST`.

    Args:
        fisher: slice key → digest in `archive`.
        shapes: slice key → tensor name → shape, of the model's weights.
        archive: holds the run's blobs.

    Raises:
        PayloadError: it does not fit the model, or is not within the bounds.
        SnapshotError: a blob is missing or corrupt.
    """
    _require_whole(fisher, shapes)
    for key in sorted(fisher):
        _checked(key, fisher, shapes[key], archive)


def _require_whole(fisher: Mapping[str, str], known: Iterable[str]) -> None:
    """Refuse a part: a version that carries one cannot be read, and passes it on."""
    odd = sorted(set(fisher) ^ set(known)) if fisher else []
    if odd:
        how = "names slice {!r}, which the model does not have" if odd[0] in fisher else "lacks slice {!r}"
        raise PayloadError("bad_tensors", f"Fisher information {how.format(odd[0][:120])}: train the run again")


def _checked(
    key: str, fisher: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], archive: BlobStore
) -> Mapping[str, np.ndarray]:
    if key not in fisher:
        return {}
    found = read_slice(key, fisher[key], archive)
    if {name: array.shape for name, array in found.items()} != shapes:
        raise PayloadError("bad_shape", f"Fisher information of slice {key} has other tensors or shapes than the model")
    for name, array in found.items():
        if not within(array, 0.0):
            raise PayloadError(
                "non_finite",
                f"Fisher information of {name} in slice {key} must be in 0..{LARGEST:.0e}: train the run again",
            )
    return found

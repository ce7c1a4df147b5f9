"""Fold the dense delta of a tier-1 training run into whatever head is when the run is done.

    W_core ← W_core + η_core · ΔW_core,        W_experts ← W_experts + η_T1 · ΔW_experts

The router is trained with the core, lies in the same shards and takes η_core. A delta is additive, so it folds into a
newer head than the one it was trained on. Slice by slice, in fp64, rounded to fp32 once; a slice whose delta is absent
or zero keeps its blob.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import PayloadError
from fednested_lib.snapshot import encode_blob, expert_of, read_slice


def fold_dense_blobs(
    blobs: Mapping[str, str],
    deltas: Mapping[str, str],
    *,
    eta_core: float,
    eta_t1: float,
    store: BlobStore,
    archive: BlobStore,
) -> dict[str, str]:
    """Fold a dense delta into the slices of a snapshot.

    Args:
        blobs: slice key → digest of the parent.
        deltas: slice key → digest of the fp32 difference in `archive`; slices that did not change are absent.
        eta_core: step of core and router, ≥ 0.
        eta_t1: step of the experts, ≥ 0.
        store: holds the parent's blobs and receives the new ones.
        archive: holds the delta's blobs.

    Returns:
        Slice key → digest.

    Raises:
        PayloadError: the delta does not fit the model, or the result is not finite.
        SnapshotError: a blob is missing or corrupt.
        StorageError: the store is full.
    """
    unknown = sorted(set(deltas) - set(blobs))
    if unknown:
        raise PayloadError(
            "bad_tensors", f"dense delta names slice {unknown[0][:120]!r}, which the model does not have"
        )
    folded = dict(blobs)
    for key in sorted(deltas):
        eta = eta_core if expert_of(key) is None else eta_t1
        if eta == 0.0:
            continue
        delta = read_slice(key, deltas[key], archive)
        if any(array.any() for array in delta.values()):
            folded[key] = store.put(encode_blob(_add(key, read_slice(key, blobs[key], store), delta, eta)))
    return folded


def _add(
    key: str, weights: Mapping[str, np.ndarray], delta: Mapping[str, np.ndarray], eta: float
) -> dict[str, np.ndarray]:
    if {name: array.shape for name, array in weights.items()} != {name: array.shape for name, array in delta.items()}:
        raise PayloadError("bad_shape", f"dense delta of slice {key} has other tensors or shapes than the model")
    result = {
        name: (weights[name] + np.float64(eta) * delta[name].astype(np.float64)).astype(np.float32) for name in weights
    }
    for name, array in result.items():
        if not np.isfinite(array).all():
            raise PayloadError(
                "non_finite", f"dense delta makes {name} of slice {key} NaN or infinite: lower eta or retrain"
            )
    return result

"""Fold the dense deltas of a round of tier-1 training runs into whatever head is when they are done.

    Δ = (1/n) · Σ_c c_c · ΔW_c
    W_core ← W_core + η_core · outer(Δ_core),    W_experts ← W_experts + η_T1 · outer(Δ_experts)

n is the number of deltas, c_c the discount of a late one; a single delta without an outer optimiser is the plain core
update. With Nesterov and several clusters this is DiLoCo (Douillard et al. 2023, arXiv 2311.08105, alg. 1). The router
is trained with the core, lies in the same shards and takes η_core. A delta is additive, so it folds into a newer head
than the one it was trained on. Slice by slice, in fp64, in the order given, rounded to fp32 once; a slice whose delta
is absent or zero in every run keeps its blob and its optimiser state.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import numpy as np

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import PayloadError
from fednested_lib.snapshot import encode_blob, expert_of, read_slice
from tier1.aggregation.outer import step_slice
from tier1.versions.settings import OuterSettings

LARGEST = 1e30  # of one value: sums of runs stay within fp32
Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


def fold_dense_blobs(
    blobs: Mapping[str, str],
    deltas: Sequence[tuple[float, Mapping[str, str]]],
    *,
    eta_core: float,
    eta_t1: float,
    store: BlobStore,
    archive: BlobStore,
    outer: OuterSettings | None = None,
    states: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Fold dense deltas into the slices of a snapshot.

    Args:
        blobs: slice key → digest of the parent.
        deltas: per run, in canonical order: its coefficient c_c / n, and slice key → digest of the difference in
            `archive`; slices that did not change are absent.
        eta_core: step of core and router, ≥ 0; 0 leaves weights and state as they are.
        eta_t1: step of the experts, likewise.
        store: holds the parent's blobs and states and receives the new ones.
        archive: holds the deltas' blobs.
        outer: the optimiser; None adds Δ as it is.
        states: slice key → digest of the parent's optimiser state.

    Returns:
        Slice key → digest of weights, and of states.

    Raises:
        PayloadError: a delta does not fit the model, or the result is not finite.
        SnapshotError: a blob is missing or corrupt.
        StorageError: the store is full.
    """
    keys = {key for _, delta in deltas for key in delta}
    _require_known(keys, blobs)
    folded, kept = dict(blobs), dict(states or {})
    for key in sorted(keys):
        eta = eta_core if expert_of(key) is None else eta_t1
        if eta == 0.0:
            continue
        weights = read_slice(key, blobs[key], store)
        mean = _mean(key, weights, deltas, archive)
        if mean is None:
            continue
        if outer is None:
            result = {name: (weights[name] + np.float64(eta) * mean[name]).astype(np.float32) for name in weights}
        else:
            result, kept[key] = step_slice(weights, mean, eta=eta, outer=outer, digest=kept.get(key), store=store)
        folded[key] = store.put(encode_blob(_finite(key, result)))
    return folded, kept


def require_delta(delta: Mapping[str, str], shapes: Mapping[str, Shapes], archive: BlobStore) -> None:
    """Check that one run's delta can be folded: all of it is there, fits the model and is within ±`LARGEST`.

    Args:
        delta: slice key → digest in `archive`.
        shapes: slice key → tensor name → shape, of the model's weights.
        archive: holds the delta's blobs.

    Raises:
        PayloadError: it does not fit, or is not within ±`LARGEST`.
        SnapshotError: a blob is missing or corrupt.
    """
    _require_known(delta, shapes)
    for key, digest in sorted(delta.items()):
        arrays = read_slice(key, digest, archive)
        _require_shapes(key, shapes[key], arrays)
        for name, array in arrays.items():
            if not within(array, -LARGEST):
                raise PayloadError(
                    "non_finite", f"dense delta of {name} in slice {key} must be within ±{LARGEST:.0e}: train it again"
                )


def within(array: np.ndarray, least: float) -> bool:
    """Say whether all values are in ``least``..`LARGEST`; fp16 does not have it, so that its inf would not be more."""
    return bool(least <= float(array.min(initial=0)) and float(array.max(initial=0)) <= LARGEST)  # NaN is neither


def _require_known(keys: Iterable[str], known: Container[str]) -> None:
    unknown = sorted(key for key in keys if key not in known)
    if unknown:
        raise PayloadError(
            "bad_tensors", f"dense delta names slice {unknown[0][:120]!r}, which the model does not have"
        )


def _require_shapes(key: str, shapes: Shapes, delta: Tensors) -> None:
    if shapes != shapes_of(delta):
        raise PayloadError("bad_shape", f"dense delta of slice {key} has other tensors or shapes than the model")


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Return name → shape."""
    return {name: array.shape for name, array in tensors.items()}


def _mean(
    key: str, weights: Tensors, deltas: Sequence[tuple[float, Mapping[str, str]]], archive: BlobStore
) -> dict[str, np.ndarray] | None:
    """Return Σ coefficient·ΔW of one slice in fp64; None if every run left it as it was."""
    total: dict[str, np.ndarray] | None = None
    for coefficient, digests in deltas:
        delta = read_slice(key, digests[key], archive) if key in digests else {}
        if not any(array.any() for array in delta.values()):
            continue
        _require_shapes(key, shapes_of(weights), delta)
        if total is None:
            total = {name: np.zeros(array.shape) for name, array in weights.items()}
        for name, array in delta.items():
            total[name] += coefficient * array.astype(np.float64)
    return total


def _finite(key: str, result: Tensors) -> Tensors:
    for name, array in result.items():
        if not np.isfinite(array).all():
            raise PayloadError(
                "non_finite", f"dense delta makes {name} of slice {key} NaN or infinite: lower eta or retrain"
            )
    return result

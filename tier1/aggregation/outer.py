"""Outer optimisers: what happens between the aggregate and the weights, per expert matrix or slice of the core.

With Δ = ΔW_agg, or the mean ΔW of a round of core updates (`dense.py`), the negative pseudo-gradient (FedOpt, Reddi et
al. 2021, arXiv 2003.00295, alg. 1; DiLoCo, Douillard et al. 2023, arXiv 2311.08105, for Nesterov):

    momentum   m ← β·m + Δ                                              W ← W + η·m
    nesterov   m ← β·m + Δ                                              W ← W + η·(Δ + β·m)
    adam       m ← β·m + (1 − β)·Δ,  v ← β₂·v + (1 − β₂)·Δ²             W ← W + η·m̂/(√v̂ + ε)

m̂ and v̂ are corrected for the number of steps k of *this* slice. With `warmup` w the β of momentum and Nesterov rises,
β_k = β · min(1, (k − 1)/w): Nesterov's first move is Δ then, not (1 + β)·Δ, where weights still change fast. State is
fp32, one blob per slice beside the weights, named in the manifest: a re-fold with halved η, a fold on another head and
replay all start from the parent's. A slice that nobody touches keeps weights and state, bit by bit: no decay, no step
from old momentum. State of another kind of optimiser is put aside and the new kind starts from zero.

Nesterov 0.9 with η_T2 = 0.5 was best in our trials. A momentum sums up to 1/(1 − β) steps, so it moves an expert by at
most η·C/(1 − β), C the clip. Adam normalises every coordinate, also one that a single device touched: choose a small η.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from fednested_lib.blobs import BlobStore
from fednested_lib.partition import expert_param
from fednested_lib.snapshot import SLICE_TENSOR, decode_blob, encode_blob, expert_of, read_slice
from tier1.aggregation.coordinate import Statistic, block_statistic
from tier1.aggregation.fold import ROWS, Term, WeightedUpdate, one_thread, stack, terms_of
from tier1.aggregation.weights import Expert
from tier1.versions.settings import OuterSettings

State = dict[str, np.ndarray]  # moments fp32 [d_out, d_in], and `steps` int64 [1]
Aggregate = Callable[[slice], torch.Tensor]  # rows -> Δ fp64 [rows, d_in]
_MOMENTS = {"momentum": ("m",), "nesterov": ("m",), "adam": ("m", "v")}
_STEPS = "steps"


def fold_stepped(
    blobs: Mapping[str, str],
    updates: Sequence[WeightedUpdate],
    *,
    eta: float,
    store: BlobStore,
    outer: OuterSettings | None,
    states: Mapping[str, str],
    by_block: frozenset[Expert] = frozenset(),
    statistic: Statistic | None = None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Fold weighted updates through a dense statistic, an outer optimiser, or both.

    Args:
        blobs: slice key → digest of the parent.
        updates: any order.
        eta: η_T2 ≥ 0; 0 leaves weights and state as they are.
        store: holds the parent's blobs and states and receives the new ones.
        outer: the optimiser; None adds the aggregate as it is.
        states: slice key → digest of the parent's optimiser state.
        by_block: experts whose updates go through `statistic` instead of being summed.
        statistic: (n, rows, d_in) → (rows, d_in).

    Returns:
        Slice key → digest of weights, and of states; what is untouched keeps its digests.

    Raises:
        SnapshotError: a blob is missing or corrupt.
        StorageError: the store is full.
    """
    ordered = sorted(updates, key=lambda update: update.update_id)
    folded, kept = dict(blobs), dict(states)
    with one_thread():
        for key in sorted(blobs) if eta else ():
            terms = terms_of(key, ordered, 1.0)
            if not terms:
                continue
            if statistic is not None and _place(key) in by_block:
                aggregate = block_statistic(_voices(key, ordered), statistic)
            else:
                aggregate = _sum(terms)
            weight = read_slice(key, blobs[key], store)[SLICE_TENSOR].copy()
            state = None if outer is None else _state(outer, states.get(key), {"": weight.shape}, store)
            _step(weight, aggregate, eta, outer, state)
            folded[key] = store.put(encode_blob({SLICE_TENSOR: weight}))
            if state is not None:
                kept[key] = store.put(encode_blob(state))
    return folded, kept


def _place(key: str) -> Expert | None:
    found = expert_of(key)
    return None if found is None else (expert_param(found[0])[0], found[1])


def _voices(key: str, updates: Sequence[WeightedUpdate]) -> list[list[Term]]:
    """Return the terms of every client that moves the slice."""
    clients: dict[str, list[WeightedUpdate]] = {}
    for update in updates:
        clients.setdefault(update.client_id, []).append(update)
    return [terms for mine in clients.values() if (terms := terms_of(key, mine, 1.0))]


def _sum(terms: Sequence[Term]) -> Aggregate:
    stacked_b, stacked_a = stack(terms)
    return lambda rows: stacked_b[rows] @ stacked_a


def step_slice(
    weights: Mapping[str, np.ndarray],
    deltas: Mapping[str, np.ndarray],
    *,
    eta: float,
    outer: OuterSettings,
    digest: str | None,
    store: BlobStore,
) -> tuple[dict[str, np.ndarray], str]:
    """Move the tensors of one slice by a dense Δ.

    Args:
        weights: name → fp32, any shape.
        deltas: name → Δ fp64 of the same shape.
        eta: step, > 0.
        outer: the optimiser.
        digest: the parent's state of this slice; None begins at zero.
        store: holds that state and receives the new one.

    Returns:
        The moved weights, fp32, and the digest of the new state.

    Raises:
        SnapshotError: the state is missing or corrupt.
        StorageError: the store is full.
    """
    state = _state(outer, digest, {name: array.shape for name, array in weights.items()}, store)
    state[_STEPS] += 1
    moved = {}
    with one_thread():
        for name in sorted(weights):
            moments = [torch.from_numpy(state[moment + name]) for moment in _MOMENTS[outer.kind]]
            move = _moved(torch.from_numpy(deltas[name]), moments, int(state[_STEPS][0]), outer)
            moved[name] = (weights[name] + np.float64(eta) * move.numpy()).astype(np.float32)
    return moved, store.put(encode_blob(state))


def _state(outer: OuterSettings, digest: str | None, shapes: Mapping[str, tuple[int, ...]], store: BlobStore) -> State:
    """Return the moments, named by kind and tensor, of the parent; zero where it has none of this kind and shape."""
    fresh: State = {
        moment + name: np.zeros(shape, np.float32) for moment in _MOMENTS[outer.kind] for name, shape in shapes.items()
    }
    fresh[_STEPS] = np.zeros(1, np.int64)
    if digest is None:
        return fresh
    found = {name: array.copy() for name, array in decode_blob(store.get(digest)).items()}
    same = {name: array.shape for name, array in found.items()} == {name: array.shape for name, array in fresh.items()}
    return found if same else fresh


def _step(
    weight: np.ndarray, aggregate: Aggregate, eta: float, outer: OuterSettings | None, state: State | None
) -> None:
    """Move `weight` and `state` in place, block of rows by block of rows."""
    target = torch.from_numpy(weight)
    if state is not None:
        state[_STEPS] += 1
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        delta = aggregate(rows)
        if outer is not None:
            moments = [torch.from_numpy(state[name])[rows] for name in _MOMENTS[outer.kind]]
            delta = _moved(delta, moments, int(state[_STEPS][0]), outer)
        target[rows] = target[rows].double().add_(delta, alpha=eta)


def _moved(delta: torch.Tensor, moments: Sequence[torch.Tensor], steps: int, outer: OuterSettings) -> torch.Tensor:
    """Return the move that Δ fp64 leads to, and move the fp32 moments in place."""
    if outer.kind != "adam":
        beta = outer.beta * min(1.0, (steps - 1) / outer.warmup) if outer.warmup else outer.beta
        momentum = moments[0].double().mul_(beta).add_(delta)
        moments[0].copy_(momentum)
        return momentum if outer.kind == "momentum" else delta + beta * momentum
    beta = outer.beta
    mean = moments[0].double().mul_(beta).add_(delta, alpha=1 - beta)
    square = moments[1].double().mul_(outer.beta2).add_(delta.square(), alpha=1 - outer.beta2)
    moments[0].copy_(mean)
    moments[1].copy_(square)
    spread = (square / (1 - outer.beta2**steps)).sqrt_().add_(outer.epsilon)
    return (mean / (1 - beta**steps)).div_(spread)

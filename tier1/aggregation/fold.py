"""Exact stacked fold of low-rank updates into the experts.

    W_e ← W_e + η_T2 · [ω_1 s_1 B_1 | … | ω_N s_N B_N] · [A_1; …; A_N],        s_d = α_d / r_d

One GEMM per expert matrix, any mix of ranks, no SVD, no rank growth: the stacking of FLoRA (Wang et al. 2024, arXiv
2409.05976), folded instead of kept. Averaging A and B separately (FedIT) is another function: it mixes the A of one
client with the B of another.

Same bytes in, same bytes out: updates are stacked in the order of their ids, the GEMM runs on one thread on operands
that torch allocated (BLAS may take another path for another thread count or alignment), in fp64, which is rounded to
fp32 once. fp64 also keeps hostile but finite factors from overflowing inside the product. The product is made in blocks
of rows that stay in the cache: no fp64 copy of W is ever whole. An expert that no update covers keeps its blob. One
expert matrix is folded at a time; a few finished ones are on their way to the disk, whose waiting would else be most of
the time of a fold of many small experts. What they hold and where it lies does not depend on their order.

With an outer optimiser (`outer.py`) or a rule that needs dense blocks (`coordinate.py`) the same blocks of rows pass
through a function more: ΔW_agg → step.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from fednested_lib.blobs import BlobStore
from fednested_lib.delta import Delta
from fednested_lib.partition import expert_param
from fednested_lib.snapshot import SLICE_TENSOR, encode_blob, expert_of, read_slice
from tier1.aggregation.weights import Expert
from tier1.versions.manifest import NumericProfile

Factors = Callable[[str, int], tuple[np.ndarray, np.ndarray]]
Term = tuple[float, np.ndarray, np.ndarray]  # (c, A [r, d_in], B [d_out, r])
WRITERS = 4  # slices on their way to the disk: most of a small slice's time is waiting for it
ROWS = 512  # of one block; part of the numeric profile of a version, as BLAS may round another block otherwise


@dataclass(frozen=True, kw_only=True)
class WeightedUpdate:
    """One update as the fold sees it.

    Args:
        update_id: gives the canonical order.
        client_id: whose it is; a rule that forms dense blocks gives every client one voice.
        scale: s = α/r.
        weights: (layer, expert) → ω.
        factors: (parameter, expert) → (A [r, d_in], B [d_out, r]).
    """

    update_id: str
    client_id: str
    scale: float
    weights: Mapping[Expert, float]
    factors: Factors


def numeric_profile() -> NumericProfile:
    """Return what "identical bytes" is promised for on this machine."""
    instruction_set = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return NumericProfile(torch=torch.__version__, instruction_set=instruction_set)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fp64(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64)  # a copy: torch's own allocation is aligned


def magnitude(delta: Delta, covered: Mapping[Expert, int]) -> tuple[float, float]:
    """Return (‖ΔW‖_F, reach) over the experts that `covered` declares with tokens > 0, without forming ΔW.

    ‖s·B·A‖²_F = s² · Σ (BᵀB) ∘ (A·Aᵀ), in fp64. The reach √Σ (s·‖B‖·‖A‖)² is never smaller; where it is larger by many
    orders the product cancels, and rounding decides about the norm.
    """
    norm2 = torch.zeros((), dtype=torch.float64)
    reach2 = torch.zeros((), dtype=torch.float64)
    with one_thread():
        for param in sorted(delta.factors):
            layer, factors = expert_param(param)[0], delta.factors[param]
            rows = [i for i, expert in enumerate(factors.expert_ids) if covered.get((layer, expert), 0) > 0]
            a, b = _fp64(factors.lora_a[rows]), _fp64(factors.lora_b[rows]).mul_(delta.spec.scale)
            norm2 += ((b.transpose(1, 2) @ b) * (a @ a.transpose(1, 2))).sum()
            reach2 += (b.square().sum((1, 2)) * a.square().sum((1, 2))).sum()
    # Rounding can leave a tiny negative sum where the product is zero.
    return float(norm2.clamp(min=0).sqrt()), float(reach2.sqrt())


def fold_matrix(weight: np.ndarray, terms: Sequence[Term]) -> np.ndarray:
    """Return W + Σ c·B·A of one expert matrix.

    Args:
        weight: W, fp32 [d_out, d_in].
        terms: (c, A [r, d_in], B [d_out, r]) in canonical order; ranks may differ.
    """
    stacked_b, stacked_a = stack(terms)
    folded = torch.empty(weight.shape)
    buffer = torch.empty((min(ROWS, len(weight)), weight.shape[1]), dtype=torch.float64)
    source = torch.from_numpy(weight) if weight.flags.writeable else torch.from_numpy(weight.copy())
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        block = buffer[: len(source[rows])]
        folded[rows] = block.copy_(source[rows]).addmm_(stacked_b[rows], stacked_a)
    return folded.numpy()


def stack(terms: Sequence[Term]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ([c_1 B_1 | …] fp64 [d_out, K], [A_1; …] fp64 [K, d_in]) with K = Σr."""
    (d_in,), (d_out,) = {a.shape[1] for _, a, _ in terms}, {b.shape[0] for *_, b in terms}
    ranks = [len(a) for _, a, _ in terms]
    stacked_b = torch.empty((d_out, sum(ranks)), dtype=torch.float64)
    stacked_a = torch.empty((sum(ranks), d_in), dtype=torch.float64)
    left, right, end = stacked_b.numpy(), stacked_a.numpy(), 0  # views: numpy's calls cost less on small matrices
    for (c, a, b), rank in zip(terms, ranks, strict=True):
        start, end = end, end + rank
        np.multiply(b, c, out=left[:, start:end], dtype=np.float64)
        right[start:end] = a
    return stacked_b, stacked_a


def fold_experts(
    blobs: Mapping[str, str], updates: Sequence[WeightedUpdate], *, eta: float, store: BlobStore
) -> dict[str, str]:
    """Fold weighted updates into the expert slices of a snapshot.

    Args:
        blobs: slice key → digest of the parent.
        updates: any order.
        eta: η_T2 ≥ 0; 0 leaves every slice as it is.
        store: holds the parent's blobs and receives the new ones.

    Returns:
        Slice key → digest; untouched slices keep theirs.

    Raises:
        SnapshotError: a parent blob is missing or corrupt.
        StorageError: the store is full.
    """
    ordered = sorted(updates, key=lambda update: update.update_id)
    folded, writing = dict(blobs), deque[tuple[str, Future[str]]]()
    with one_thread(), ThreadPoolExecutor(WRITERS) as writers:
        for key in sorted(blobs):
            terms = terms_of(key, ordered, eta)
            if terms:
                weight = read_slice(key, blobs[key], store)[SLICE_TENSOR]
                data = encode_blob({SLICE_TENSOR: fold_matrix(weight, terms)})
                writing.append((key, writers.submit(store.put, data)))
            if len(writing) >= WRITERS:
                _collect(writing, folded)
        while writing:
            _collect(writing, folded)
    return folded


def _collect(writing: deque[tuple[str, Future[str]]], folded: dict[str, str]) -> None:
    key, digest = writing.popleft()
    folded[key] = digest.result()


def terms_of(key: str, updates: Sequence[WeightedUpdate], eta: float) -> list[Term]:
    """Return (η·ω·s, A, B) of every update that moves the expert slice `key`, in the order given."""
    place = expert_of(key)
    if place is None:
        return []
    param, expert = place
    layer, _ = expert_param(param)
    terms = []
    for update in updates:
        coefficient = eta * update.weights.get((layer, expert), 0.0) * update.scale
        if coefficient != 0.0:
            terms.append((coefficient, *update.factors(param, expert)))
    return terms

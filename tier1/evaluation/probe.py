"""The probe: refuse updates that raise the loss of tier 1's own suites, to first order.

    cos_d = −⟨∇L(W), ΔW_d⟩ / (‖∇L(W)‖ · ‖ΔW_d‖),    refused if cos_d < −margin

L is the mean loss of the evaluation suites at the head W that the updates are to be folded into, ∇ over the expert
weights: one backward pass per cut, whatever the number of updates; the zeroth order of Zeno++ (Xie et al. 2019, arXiv
1903.07020) in one direction. Why not from the updates alone: LoRA updates that start from random A are nearly
orthogonal, honest ones too (cosine 0.01 between devices, 0.05 to the gradient, in a model of 200 k parameters), so that
no distance or cosine among ten of them tells an update from its negative. An honest device that only knows other text
has a cosine near 0: `margin` is for those.

A refusal is a record with its measured value, like any other, and replay takes it from there: the suites are no input
of F. Experts' gradients in memory: as much as their weights.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fednested_lib.blobs import BlobStore
from fednested_lib.delta import Delta, squared_norm
from fednested_lib.errors import EnvelopeError
from fednested_lib.partition import expert_param
from fednested_lib.snapshot import SnapshotManifest, build_model, expert_shapes
from fednested_lib.training import deterministic
from tier1.evaluation.suites import BATCH_ROWS, pack_suite
from tier1.versions.admission import Admission, refusal
from tier1.versions.archive import Shapes, read_delta

Gradient = Mapping[str, np.ndarray]  # expert parameter -> [experts, d_out, d_in]


def descent(
    snapshot: SnapshotManifest, suites: Mapping[str, Path], blobs: BlobStore, *, seq_len: int, max_tokens: int
) -> Gradient:
    """Return −∇L of the suites' mean loss over the expert weights, fp32; every suite counts the same.

    Raises:
        SnapshotError: a blob is missing or corrupt.
        DataError: a suite is unusable.
    """
    model, tokenizer = build_model(snapshot, blobs), blobs.get(snapshot.tokenizer)
    wanted = {name: p for name, p in model.named_parameters() if name in expert_shapes(snapshot)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    model.eval()
    with deterministic():
        for path in suites.values():
            rows = pack_suite(path, tokenizer, seq_len=seq_len, max_tokens=max_tokens).tokens
            _backward(model, rows, 1.0 / (len(suites) * len(rows) * seq_len))
    return {name: -p.grad.float().numpy() for name, p in wanted.items() if p.grad is not None}


def _backward(model: nn.Module, rows: np.ndarray, weight: float) -> None:
    for start in range(0, len(rows), BATCH_ROWS):
        batch = torch.from_numpy(rows[start : start + BATCH_ROWS].astype(np.int64)).to(model.device)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")
        (weight * nats).backward()


def cosine(direction: Gradient, delta: Delta, covered: Container[tuple[int, int]]) -> float:
    """Return the cosine of an update to a direction, every expert of the update brought to the same norm first.

    ⟨D, s·B·A⟩ = s · Σ (Bᵀ·D) ∘ A per expert: the update is never formed. The same norm, because a later clip may be per
    expert: a huge part that helps must not pay for small ones that harm. 0 where there is nothing to compare.

    Args:
        direction: dense, over all experts.
        delta: the update.
        covered: (layer, expert) that the update declares tokens for; the rest is not folded.
    """
    inner, norm2, scale = defaultdict(float), defaultdict(float), delta.spec.scale
    for name, factors in delta.factors.items():
        layer = expert_param(name)[0]
        squares = squared_norm(factors, scale)
        for row, expert in enumerate(factors.expert_ids):
            if (layer, expert) in covered and name in direction:
                a, b = factors.lora_a[row].astype(np.float64), factors.lora_b[row].astype(np.float64)
                inner[layer, expert] += scale * float(((b.T @ direction[name][expert]) * a).sum())
                norm2[layer, expert] += float(squares[row])
    units = [inner[place] / math.sqrt(norm2[place]) for place in inner if norm2[place] > 0]
    length = math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in direction.values()))
    return math.fsum(units) / (length * math.sqrt(len(units))) if units and length > 0 else 0.0


def probed(
    admission: Admission, direction: Gradient, *, margin: float, archive: BlobStore, shapes: Shapes
) -> Admission:
    """Move the updates whose cosine to `direction` is below −margin to the refused, as `harmful`.

    Raises:
        SnapshotError: a payload is missing or corrupt.
    """
    kept, refused = [], list(admission.refused)
    for update in admission.updates:
        covered = {place for place, count in update.tokens().items() if count > 0}
        found = cosine(direction, read_delta(update, archive, shapes), covered)
        if found < -margin:
            error = EnvelopeError(
                "harmful",
                f"cosine to what lowers the loss of the suites must be at least {-margin:g}, got {found:.4f}",
            )
            refused.append(refusal(update, update.envelope, error))
        else:
            kept.append(update)
    return Admission(updates=tuple(kept), refused=tuple(refused))

"""The probe: refuse updates that raise the loss of tier 1's own suites.

    cos_d = −⟨∇L(W′), ΔW_d⟩ / (‖∇L(W′)‖ · ‖ΔW_d‖),                      refused if cos_d < −margin

L is the mean loss of the evaluation suites, W′ the weights after the fold of all admitted updates, ∇ over the expert
weights. There an update is harmful if a little less of it were better, so that colluders answer for the curvature of
what they do together; before the fold a shift that all of them share costs nothing to first order. One backward pass
per cut, whatever the number of updates; if nothing is refused, that fold is the candidate. The idea of judging by a
server's loss is Zeno++'s (Xie et al. 2019, arXiv 1903.07020).

Why not from the updates alone: LoRA updates that start from random A are nearly orthogonal, honest ones too (cosine
0.01 between devices, 0.05 to the gradient, in a model of 260 k parameters), so that no distance or cosine among ten of
them tells an update from its negative. A device whose text is in no suite has a cosine near 0: `margin` is for those.

A refusal is a record with its measured value, like any other, and replay takes it from there: the suites are no input
of F. In memory: the model and its experts' gradients.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
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
from tier1.aggregation.weights import Expert
from tier1.evaluation.suites import BATCH_ROWS, pack_suite
from tier1.versions.admission import Admission, refusal
from tier1.versions.archive import Update, read_delta

Gradient = Mapping[str, np.ndarray]  # expert parameter -> [experts, d_out, d_in]


def probed(
    admission: Admission,
    folded: SnapshotManifest,
    suites: Mapping[str, Path],
    *,
    margin: float,
    blobs: BlobStore,
    archive: BlobStore,
    seq_len: int,
    max_tokens: int,
) -> Admission:
    """Move the updates that raise the loss of the suites to the refused, as `harmful`.

    Args:
        admission: what was admitted of a cut.
        folded: what the fold of all of it gives.
        suites: name → JSONL file; every suite counts the same.
        margin: how far below zero a cosine may be.
        blobs: holds the weights and the tokenizer.
        archive: holds the payloads.
        seq_len: predicted tokens per row.
        max_tokens: most tokens per suite.

    Raises:
        SnapshotError: a blob or a payload is missing or corrupt.
        DataError: a suite is unusable.
    """
    shapes = expert_shapes(folded)
    rows = [
        pack_suite(path, blobs.get(folded.tokenizer), seq_len=seq_len, max_tokens=max_tokens).tokens
        for path in suites.values()
    ]
    direction = descent(build_model(folded, blobs), rows, shapes)
    kept, refused = [], list(admission.refused)
    for update in admission.updates:
        found = cosine(direction, read_delta(update, archive, shapes), covered(update))
        if found < -margin:
            refused.append(refusal(update, update.envelope, _harmful(found, margin)))
        else:
            kept.append(update)
    return Admission(updates=tuple(kept), refused=tuple(refused))


def _harmful(found: float, margin: float) -> EnvelopeError:
    bound = f"cosine to what lowers the loss of the suites must be at least {-margin:g}"
    return EnvelopeError("harmful", f"{bound}, got {found:.4f}")


def covered(update: Update) -> set[Expert]:
    """Return the (layer, expert) that an update declares tokens for; the rest is not folded."""
    return {place for place, count in update.tokens().items() if count > 0}


def expert_squares(delta: Delta, places: Container[Expert]) -> dict[Expert, float]:
    """Return ‖ΔW_e‖² of the experts in `places`."""
    found: dict[Expert, float] = defaultdict(float)
    for name, factors in delta.factors.items():
        for expert, square in zip(factors.expert_ids, squared_norm(factors, delta.spec.scale), strict=True):
            if (expert_param(name)[0], expert) in places:
                found[expert_param(name)[0], expert] += max(float(square), 0.0)
    return dict(found)


def descent(model: nn.Module, suites: Sequence[np.ndarray], names: Container[str]) -> Gradient:
    """Return −∇L of the suites' mean loss over the parameters in `names`, fp32.

    Args:
        model: put into evaluation mode.
        suites: rows int32 [n, seq_len + 1] of each.
        names: expert parameters.
    """
    wanted = {name: parameter for name, parameter in model.named_parameters() if name in names}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    model.eval()
    with deterministic():
        for rows in suites:
            _backward(model, rows, 1.0 / (len(suites) * rows[:, 1:].size))
    return {name: -p.grad.float().cpu().numpy() for name, p in wanted.items() if p.grad is not None}


def _backward(model: nn.Module, rows: np.ndarray, weight: float) -> None:
    for start in range(0, len(rows), BATCH_ROWS):
        batch = torch.from_numpy(rows[start : start + BATCH_ROWS].astype(np.int64)).to(model.device)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")
        (weight * nats).backward()


def cosine(direction: Gradient, delta: Delta, places: Container[Expert]) -> float:
    """Return the cosine of an update to a direction, every expert of the update brought to the same norm first.

    ⟨D, s·B·A⟩ = s · Σ (Bᵀ·D) ∘ A per expert: the update is never formed. The same norm, because the clip is per expert
    too: a huge part that helps must not pay for small ones that harm. 0 where there is nothing to compare.

    Args:
        direction: dense, over all experts.
        delta: the update.
        places: (layer, expert) that count.
    """
    inner: dict[Expert, float] = defaultdict(float)
    for name, factors in delta.factors.items():
        layer = expert_param(name)[0]
        for row, expert in enumerate(factors.expert_ids):
            if (layer, expert) in places and name in direction:
                a, b = factors.lora_a[row].astype(np.float64), factors.lora_b[row].astype(np.float64)
                inner[layer, expert] += delta.spec.scale * float(((b.T @ direction[name][expert]) * a).sum())
    squares = expert_squares(delta, places)
    units = [inner[place] / math.sqrt(squares[place]) for place in inner if squares[place] > 0]
    length = math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in direction.values()))
    return math.fsum(units) / (length * math.sqrt(len(units))) if units and length > 0 else 0.0

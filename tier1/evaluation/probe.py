"""The probe: refuse updates that raise the loss of tier 1's own suites.

    v     = Σ_d k_d·ΔW_d / n_e          the step that all admitted updates would make together, clipped, evenly weighed
    cos_d = −⟨∇L(W + v), ΔW_d⟩ / (‖∇L(W + v)‖ · ‖ΔW_d‖),                refused if cos_d < −margin

L is the mean loss of the evaluation suites, W the head, ∇ over the expert weights. At the end of the step an update is
harmful if a little less of it were better, so that colluders answer for the curvature of what they do together; at W
itself a shift that all of them share costs nothing to first order. One backward pass per cut, whatever the number of
updates. The idea of judging by a server's loss is Zeno++'s (Xie et al. 2019, arXiv 1903.07020).

Why not from the updates alone: LoRA updates that start from random A are nearly orthogonal, honest ones too (cosine
0.01 between devices, 0.05 to the gradient, in a model of 260 k parameters), so that no distance or cosine among ten of
them tells an update from its negative. A device whose text is in no suite has a cosine near 0: `margin` is for those.

A refusal is a record with its measured value, like any other, and replay takes it from there: the suites are no input
of F. In memory: the model and its experts' gradients.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fednested_lib.adapters import merge
from fednested_lib.blobs import BlobStore
from fednested_lib.delta import Delta, ExpertFactors, squared_norm
from fednested_lib.errors import EnvelopeError
from fednested_lib.partition import expert_param
from fednested_lib.snapshot import SnapshotManifest, build_model, expert_shapes
from fednested_lib.training import deterministic
from tier1.aggregation.weights import Expert, clip_factor, device_clips, expert_bound
from tier1.evaluation.suites import BATCH_ROWS, pack_suite
from tier1.versions.admission import Admission, refusal
from tier1.versions.archive import Update, read_delta
from tier1.versions.settings import AggregationSettings

Gradient = Mapping[str, np.ndarray]  # expert parameter -> [experts, d_out, d_in]


def probed(
    admission: Admission,
    head: SnapshotManifest,
    suites: Mapping[str, Path],
    settings: AggregationSettings,
    *,
    blobs: BlobStore,
    archive: BlobStore,
    seq_len: int,
    max_tokens: int,
) -> Admission:
    """Move the updates that raise the loss of the suites to the refused, as `harmful`.

    Args:
        admission: what was admitted of a cut.
        head: what it is to be folded into.
        suites: name → JSONL file; every suite counts the same.
        settings: `probe`, the margin, and the clip.
        blobs: holds the head's weights and tokenizer.
        archive: holds the payloads.
        seq_len: predicted tokens per row.
        max_tokens: most tokens per suite.

    Raises:
        SnapshotError: a blob or a payload is missing or corrupt.
        DataError: a suite is unusable.
    """
    assert settings.probe is not None, "the probe is on"
    shapes = expert_shapes(head)

    def read(update: Update) -> Delta:
        return read_delta(update, archive, shapes)

    model = build_model(head, blobs)
    for update, shares in zip(admission.updates, step_shares(admission.updates, read, settings), strict=True):
        merge(model, weighted(read(update), shares))
    rows = [
        pack_suite(path, blobs.get(head.tokenizer), seq_len=seq_len, max_tokens=max_tokens).tokens
        for path in suites.values()
    ]
    direction = descent(model, rows, shapes)
    kept, refused = [], list(admission.refused)
    for update in admission.updates:
        found = cosine(direction, read(update), covered(update))
        if found < -settings.probe:
            refused.append(refusal(update, update.envelope, _harmful(found, settings.probe)))
        else:
            kept.append(update)
    return Admission(updates=tuple(kept), refused=tuple(refused))


def _harmful(found: float, margin: float) -> EnvelopeError:
    bound = f"cosine to what lowers the loss of the suites must be at least {-margin:g}"
    return EnvelopeError("harmful", f"{bound}, got {found:.4f}")


def covered(update: Update) -> set[Expert]:
    """Return the (layer, expert) that an update declares tokens for; the rest is not folded."""
    return {place for place, count in update.tokens().items() if count > 0}


def step_shares(
    updates: Sequence[Update], read: Callable[[Update], Delta], settings: AggregationSettings
) -> list[dict[Expert, float]]:
    """Return, per update and covered expert, k/n: clipped as the fold clips, weighed evenly over n updates."""
    clients, tokens = [update.envelope.client_id for update in updates], [update.tokens() for update in updates]
    squares = [expert_squares(read(update), covered(update)) for update in updates]
    norms = [math.sqrt(math.fsum(each.values())) for each in squares]
    clips = device_clips(clients, norms, tokens, settings)
    clipped = [k * norm for k, norm in zip(clips, norms, strict=True)]
    bound = expert_bound(clients, clipped, tokens, settings) or math.inf
    n = Counter(place for each in squares for place in each)
    return [
        {place: k * clip_factor(k * math.sqrt(square), bound) / n[place] for place, square in each.items()}
        for k, each in zip(clips, squares, strict=True)
    ]


def expert_squares(delta: Delta, places: Container[Expert]) -> dict[Expert, float]:
    """Return ‖ΔW_e‖² of the experts in `places`."""
    found: dict[Expert, float] = defaultdict(float)
    for name, factors in delta.factors.items():
        for expert, square in zip(factors.expert_ids, squared_norm(factors, delta.spec.scale), strict=True):
            if (expert_param(name)[0], expert) in places:
                found[expert_param(name)[0], expert] += max(float(square), 0.0)
    return dict(found)


def weighted(delta: Delta, weights: Mapping[Expert, float]) -> Delta:
    """Return the delta with every expert times its weight, 0 where there is none."""
    factors = {}
    for name, each in delta.factors.items():
        layer = expert_param(name)[0]
        by_row = np.array([weights.get((layer, expert), 0.0) for expert in each.expert_ids])
        factors[name] = ExpertFactors(
            expert_ids=each.expert_ids,
            lora_a=each.lora_a,
            lora_b=(each.lora_b * by_row[:, None, None]).astype(np.float32),
        )
    return Delta(spec=delta.spec, factors=factors)


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

"""What keeps a training run from erasing what the model knew: terms of the loss, their settings, and who is frozen.

    replay        + w · CE(old rows)                                   rehearsal (Robins 1995)
    distillation  + w · KL(p_base ‖ p) on old rows                     LwF, arXiv:1606.09282; DER++, arXiv:2004.07211
    EWC           + w/2 · Σ_i F_i · (θ_i − θ*_i)²                      arXiv:1612.00796, online: arXiv:1805.06370
    freeze        experts to which old rows send a large share of their tokens stay as they are
    frequencies   a group moves every n-th step, or never (`tier1/training/pace.py`)

θ* and p_base are the weights the run starts from. F_i is the diagonal Fisher information per token, summed over the
runs before this one, each at the weights it ended with: EWC alone needs no old text. Replay and distillation need some
(the rehearsal rows) and keep far more of it. Each works alone; several add up. All that they are is a function of
base, rows and settings, and which rows a step draws follows from the random numbers that the trainer seeds it with, so
that a resumed run ends with the same bits.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from fednested_lib.partition import expert_param, group_of
from fednested_lib.training import deterministic
from tier1.training.loss import Term
from tier1.training.pace import Frequencies, Pace, Period


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """Replay or distillation: ``weight`` ≥ 0 of the term, and ``rows`` ≥ 1 that a step draws, over all ranks."""

    weight: float = 1.0
    rows: int = 8


@dataclass(frozen=True, kw_only=True)
class Ewc:
    """EWC: ``weight`` ≥ 0, ``rows`` ≥ 1 that a Fisher is taken from, ``decay`` 0..1 of the earlier runs' Fisher."""

    weight: float
    rows: int = 128
    decay: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Freeze:
    """Freeze each expert that takes at least ``share`` (0..1) of the old rows' assignments in its layer."""

    share: float


@dataclass(frozen=True, kw_only=True)
class Safeguards:
    """Which safeguards a run has; None is off."""

    replay: Rehearsed | None = None
    distillation: Rehearsed | None = None
    ewc: Ewc | None = None
    freeze: Freeze | None = None
    frequencies: Frequencies | None = None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is known of the old domains when a run starts.

    Args:
        rows: Integer [n, seq_len + 1] of old text; replay, distillation and freezing need at least one.
        fisher: Parameter name → diagonal Fisher information; a parameter without one is free.
    """

    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 1), np.int32))
    fisher: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Content hash: runs that protect different things are different runs."""
        content = hashlib.sha256(repr((self.rows.shape, sorted(self.fisher))).encode())
        for array in (self.rows, *(self.fisher[name].numpy() for name in sorted(self.fisher))):
            content.update(np.ascontiguousarray(array).tobytes())
        return content.hexdigest()


def terms_of(safeguards: Safeguards, memory: Memory, base: nn.Module, world_size: int = 1) -> list[Term]:
    """Return what the safeguards add to the loss of a run that starts from ``base``."""
    terms: list[Term] = []
    if safeguards.replay:
        terms.append(Replay(safeguards.replay, memory.rows, world_size))
    if safeguards.distillation:
        terms.append(Distillation(safeguards.distillation, memory.rows, base, world_size))
    if safeguards.ewc and memory.fisher:
        terms.append(Consolidation(safeguards.ewc.weight, memory.fisher, base))
    return terms


def pace_of(safeguards: Safeguards, memory: Memory, base: nn.Module, family: str) -> Pace | None:
    """Return which parameters and experts move at which steps; None: all move at every step."""
    periods: dict[str, Period] = {}
    if safeguards.frequencies:
        periods = safeguards.frequencies.periods(base, family)
    if safeguards.freeze:
        shares = routed_shares(base, memory.rows)
        for name, parameter in base.named_parameters():
            if group_of(name, family) == "experts":
                own = periods.get(name, 1)
                own = list(own) if isinstance(own, Sequence) else [own] * len(parameter)
                needed = shares[expert_param(name)[0]] >= safeguards.freeze.share
                periods[name] = [None if frozen else period for frozen, period in zip(needed, own, strict=True)]
    return Pace(periods) if periods else None


class Replay:
    """CE of rows drawn from the old ones: the next-token loss that they had."""

    def __init__(self, settings: Rehearsed, rows: np.ndarray, world_size: int = 1):
        assert len(rows), "replay needs old rows"
        self._weight, self._rows, self._n_rows = settings.weight, rows, math.ceil(settings.rows / world_size)

    def __call__(self, model: nn.Module, rows: Tensor, output: MoeCausalLMOutputWithPast) -> Tensor:
        """Return weight · CE, nats per token."""
        old = _draw(self._rows, self._n_rows).to(rows.device)
        logits = model(input_ids=old[:, :-1], use_cache=False).logits
        return self._weight * nn.functional.cross_entropy(logits.flatten(0, 1), old[:, 1:].flatten())


class Distillation:
    """KL(p_base ‖ p) per token on rows drawn from the old ones: the base's whole distribution, not the text alone."""

    def __init__(self, settings: Rehearsed, rows: np.ndarray, base: nn.Module, world_size: int = 1):
        assert len(rows), "distillation needs old rows"
        self._weight, self._rows, self._n_rows = settings.weight, rows, math.ceil(settings.rows / world_size)
        self._teacher = copy.deepcopy(base).eval().requires_grad_(False)

    def __call__(self, model: nn.Module, rows: Tensor, output: MoeCausalLMOutputWithPast) -> Tensor:
        """Return weight · KL, nats per token."""
        old = _draw(self._rows, self._n_rows)[:, :-1].to(rows.device)
        with torch.no_grad():
            wanted = self._teacher(input_ids=old, use_cache=False).logits
        return self._weight * divergence(wanted, model(input_ids=old, use_cache=False).logits)


class Consolidation:
    """EWC: a spring at every weight of the base, as stiff as the old domains' Fisher information."""

    def __init__(self, weight: float, fisher: Mapping[str, Tensor], base: nn.Module):
        parameters = dict(base.named_parameters())
        self._weight = weight
        self._springs = {
            name: (stiffness.to(parameters[name].device), parameters[name].detach().clone())
            for name, stiffness in fisher.items()
        }

    def __call__(self, model: nn.Module, rows: Tensor, output: MoeCausalLMOutputWithPast) -> Tensor:
        """Return weight/2 · Σ F·(θ − θ*)², nats per token."""
        parameters = dict(model.named_parameters())
        energies = [
            (stiffness * (parameters[name] - rest).square()).sum() for name, (stiffness, rest) in self._springs.items()
        ]
        return self._weight / 2 * torch.stack(energies).sum()


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return KL(softmax wanted ‖ softmax found), mean over all but the last dimension, nats."""
    log_wanted, log_found = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return (log_wanted.exp() * (log_wanted - log_found)).sum(-1).mean()


def fisher_diagonal(model: nn.Module, rows: np.ndarray) -> dict[str, Tensor]:
    """Return E[(∂ log p(x_t) / ∂θ_i)²] per parameter, the empirical diagonal Fisher information of a token.

    Tokens of a row have uncorrelated scores if the model is right, so a row of T tokens gives one sample of T times it:
    one backward pass a row, F = mean over rows of (∇ Σ_t log p)² / T.

    Args:
        model: Any causal language model; left as it is.
        rows: Integer [n ≥ 1, seq_len + 1].

    Returns:
        fp32 on the CPU, by parameter name; tied weights count once.
    """
    parameters = dict(model.named_parameters())
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    was_training = model.training
    model.eval()
    with deterministic(), torch.enable_grad():
        for row in torch.from_numpy(rows.astype(np.int64)).to(next(iter(parameters.values())).device):
            logits = model(input_ids=row[None, :-1], use_cache=False).logits[0].float()
            nats = nn.functional.cross_entropy(logits, row[1:], reduction="sum")
            scores = torch.autograd.grad(nats, list(parameters.values()), allow_unused=True)
            for name, score in zip(parameters, scores, strict=True):
                if score is not None:  # an expert that no token reached
                    fisher[name] += score.square() / (len(rows) * (len(row) - 1))
    model.train(was_training)
    return {name: tensor.detach().cpu().float() for name, tensor in fisher.items()}


def accumulated(earlier: Mapping[str, Tensor], own: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """Return decay · earlier + own, the Fisher information of all runs so far."""
    return {name: tensor + decay * earlier[name] if name in earlier else tensor for name, tensor in own.items()}


def routed_shares(model: nn.Module, rows: np.ndarray, batch_rows: int = 32) -> np.ndarray:
    """Return [layers, E]: which share of the rows' token assignments goes to each expert; a layer's sum is 1."""
    top_k, counts = model.config.num_experts_per_tok, 0
    was_training = model.training
    model.eval()
    with deterministic(), torch.inference_mode():
        for start in range(0, len(rows), batch_rows):
            batch = torch.from_numpy(rows[start : start + batch_rows, :-1].astype(np.int64)).to(model.device)
            layers = model(input_ids=batch, output_router_logits=True, use_cache=False).router_logits
            chosen = [logits.softmax(-1).topk(top_k, -1).indices.flatten() for logits in layers]
            counts = counts + torch.stack([e.bincount(minlength=layers[0].shape[-1]) for e in chosen]).cpu()
    model.train(was_training)
    shares = counts.double() / counts.sum(-1, keepdim=True)
    return shares.numpy()


def _draw(rows: np.ndarray, n: int) -> Tensor:
    # torch's generator, which the trainer seeds by run, step and rank.
    return torch.from_numpy(rows[torch.randint(len(rows), (n,)).numpy()].astype(np.int64))

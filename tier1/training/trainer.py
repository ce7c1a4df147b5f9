"""Train core, router and experts together: next-token loss, router balancing, AdamW with one rate per group.

    L = CE(next token) + c_aux · L_aux,    L_aux = E · Σ_e f_e · P_e      (Switch Transformer, arXiv:2101.03961)
    θ_g ← AdamW(θ_g, ∇L, η_g · schedule(step)),  g ∈ {core, router, experts}     (arXiv:1711.05101)

f_e is the share of tokens routed to expert e and P_e its mean router probability; without L_aux a few experts take all
tokens. The schedule warms up linearly and falls to a tenth along a cosine.

`Backend` is the seam where another engine (DeepSpeed) comes in: the loop, the data order, the schedule and the
stop on a bad loss stay here; how a step is computed and where the weights live is the backend's. One process with plain
torch is right up to some hundred million parameters, and in tests (DeepSpeed costs 1.3 to 2.1 times as much there).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from fednested_lib.errors import DataError, TrainingError
from fednested_lib.partition import Group, group_of

log = structlog.get_logger()

FINAL_RATE = 0.1
OnStep = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Hyper-parameters of one training run.

    Args:
        steps: Optimiser steps, ≥ 1.
        batch_size: Rows per step, ≥ 1.
        learning_rate: Peak rate of the core, and of the groups that have none of their own.
        expert_learning_rate: Peak rate of the experts.
        router_learning_rate: Peak rate of the router.
        warmup: Share of the steps with a rising rate, 0..1.
        weight_decay: Of matrices; norms are not decayed.
        aux_loss: Coefficient c_aux of the router balancing loss.
        grad_clip: Largest global gradient norm.
        seed: Of the order of the rows.
        threads: CPU threads; part of the numeric profile. More than one pays only on idle cores (OpenMP threads spin
            while they wait: set OMP_WAIT_POLICY=PASSIVE where other processes compete).
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 3e-3
    expert_learning_rate: float | None = None
    router_learning_rate: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.1
    aux_loss: float = 0.02
    grad_clip: float = 1.0
    seed: int = 0
    threads: int = 1

    def rate_of(self, group: Group) -> float:
        """Return the peak learning rate of one parameter group."""
        own = {"core": None, "router": self.router_learning_rate, "experts": self.expert_learning_rate}[group]
        return self.learning_rate if own is None else own


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run did; losses are next-token cross-entropies of training batches, nats per token."""

    loss_first: float
    loss_last: float
    steps: int
    tokens: int


class Backend(Protocol):
    """How one step is computed and where the weights live."""

    def prepare(self, model: nn.Module, settings: TrainSettings, family: str) -> None:
        """Take the model over; called once, before the first step."""

    def step(self, rows: Tensor, rate: float) -> float:
        """Take one optimiser step at ``rate`` times the peak rates.

        Args:
            rows: int64 [batch, seq_len + 1] token ids.
            rate: Factor of the schedule, 0..1.

        Returns:
            Next-token loss before the step. If loss or gradient is not finite: NaN, and no step is taken.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights under the in-memory names of transformers."""


class TorchBackend:
    """One process, plain torch; trains the model in place."""

    def prepare(self, model: nn.Module, settings: TrainSettings, family: str) -> None:
        """Take the model over."""
        self._model, self._settings = model.train().requires_grad_(True), settings
        groups = parameter_groups(model, settings, family)
        self._peaks = [group["lr"] for group in groups]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def step(self, rows: Tensor, rate: float) -> float:
        """Take one optimiser step; NaN and no step if loss or gradient is not finite."""
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        self._optimizer.zero_grad(set_to_none=True)
        output = self._model(input_ids=rows[:, :-1], output_router_logits=True, use_cache=False)
        loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), rows[:, 1:].flatten())
        (loss + self._settings.aux_loss * output.aux_loss).backward()
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.grad_clip)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            return math.nan
        self._optimizer.step()
        return loss.item()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights."""
        return {name: tensor.detach() for name, tensor in self._model.state_dict().items()}


def parameter_groups(model: nn.Module, settings: TrainSettings, family: str) -> list[dict]:
    """Group trainable parameters by learning rate and by whether they decay."""
    groups: dict[tuple[Group, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((group_of(name, family), parameter.dim() > 1), []).append(parameter)
    return [
        {"params": params, "lr": settings.rate_of(group), "weight_decay": settings.weight_decay if decays else 0.0}
        for (group, decays), params in groups.items()
    ]


def train(
    model: nn.Module,
    tokens: np.ndarray,
    settings: TrainSettings,
    *,
    family: str,
    backend: Backend | None = None,
    on_step: OnStep | None = None,
) -> TrainReport:
    """Train ``model`` on packed rows; the same arguments give the same weights on one numeric profile.

    Args:
        model: Transformers MoE model; the default backend trains it in place.
        tokens: Integer [n_rows, seq_len + 1].
        settings: Hyper-parameters.
        family: Model family, a key of the partition rules.
        backend: Engine; one torch process by default.
        on_step: Called with step number (from 1) and loss after each step.

    Raises:
        TrainingError: Loss or gradient is not finite; the weights are those after the last good step.
        DataError: There is no row.
    """
    if len(tokens) < 1:
        raise DataError("number of token rows must be at least 1, got 0: add text")
    backend = backend or TorchBackend()
    backend.prepare(model, settings, family)
    losses: list[float] = []
    with _numeric_profile(settings.threads):
        for step, rows in enumerate(batches(tokens, settings), start=1):
            loss = backend.step(rows, rate=schedule(step, settings))
            if not math.isfinite(loss):
                raise TrainingError(
                    f"loss or gradient at step {step} of {settings.steps} is not finite (learning rate "
                    f"{settings.learning_rate:g}): lower core.learning_rate; the weights of step {step - 1} are kept"
                )
            losses.append(loss)
            if on_step:
                on_step(step, loss)
    log.info("core.trained", steps=len(losses), loss_first=round(losses[0], 4), loss_last=round(losses[-1], 4))
    return TrainReport(
        loss_first=losses[0],
        loss_last=losses[-1],
        steps=len(losses),
        tokens=len(losses) * settings.batch_size * (tokens.shape[1] - 1),
    )


def schedule(step: int, settings: TrainSettings) -> float:
    """Return the factor on the peak rates at ``step`` (from 1): linear warm-up, then a cosine down to a tenth."""
    warmup_steps = max(1, round(settings.warmup * settings.steps))
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, settings.steps - warmup_steps)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def batches(tokens: np.ndarray, settings: TrainSettings) -> Iterator[Tensor]:
    """Yield ``steps`` batches; every row is used once before any is used again."""
    rng = np.random.Generator(np.random.Philox(settings.seed))
    order = np.empty(0, np.int64)
    for _ in range(settings.steps):
        while len(order) < settings.batch_size:
            order = np.concatenate([order, rng.permutation(len(tokens))])
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        yield torch.from_numpy(tokens[chosen].astype(np.int64))


def dense_delta(before: dict[str, Tensor], after: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Return local − base of every parameter, in fp32; it is added with +η.

    Raises:
        PartitionError: A parameter that no rule of ``family`` names.
    """
    assert before.keys() == after.keys(), "both states belong to one model"
    for name in before:
        group_of(name, family)
    return {name: after[name].float() - before[name].float() for name in before}


@contextmanager
def _numeric_profile(threads: int) -> Iterator[None]:
    """Fix the number of threads and refuse non-deterministic kernels, and restore both afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])

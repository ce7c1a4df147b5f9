"""Update frequencies: a group of parameters, or a single expert, moves every n-th step or never.

    θ ← AdamW(θ, mean of the last n gradients)  if n divides the step, else θ stays     (CMS, arXiv:2512.24695, eq. 71)

Fast groups take up what is new, slow ones average it, frozen ones keep what they are: a continuum of memories. What
does not move keeps its bits: weight decay and moments rest as well. The gradients of a slow group are collected between
its steps, beside AdamW's moments, and are part of a checkpoint as these are. Steps are those that the optimiser counts,
also over several runs; a slow group's moments are corrected for the moves that it has made itself.

It acts entry by entry on the tensors that the optimiser has, so that they may be parameters or flat parts of many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fednested_lib.partition import group_of

Period = int | None | Sequence[int | None]
COLLECTED = "collected"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Frequencies:
    """Steps between two moves of a group, ≥ 1; None is frozen.

    Args:
        core: Of embeddings, attention and norms.
        router: Of the gates.
        experts: Of all experts, or a sequence: expert e has ``experts[e mod len]``.
    """

    core: int | None = 1
    router: int | None = 1
    experts: int | None | Sequence[int | None] = 1

    def periods(self, model: nn.Module, family: str) -> dict[str, Period]:
        """Return the period of each parameter that does not move at every step; of expert parameters, per expert."""
        found: dict[str, Period] = {}
        for name, parameter in model.named_parameters():
            period = getattr(self, group_of(name, family))
            if isinstance(period, Sequence):
                period = [period[expert % len(period)] for expert in range(len(parameter))]
            if period != 1:
                found[name] = period
        return found

    def slow(self, model: nn.Module, family: str) -> set[str]:
        """Return the names of the parameters of which anything moves less often than every step, but does move."""
        periods = self.periods(model, family)
        return {
            name for name, period in periods.items() if (entry_periods(period, model.get_parameter(name)) > 1).any()
        }


def entry_periods(period: Period, tensor: Tensor) -> Tensor:
    """Return int32 [1, …] or [E, 1, …], which broadcasts to ``tensor``; 0 is never."""
    each = period if isinstance(period, Sequence) else [period]
    shape = (len(each), *[1] * (tensor.dim() - 1))
    return torch.tensor([one or 0 for one in each], dtype=torch.int32, device=tensor.device).view(shape)


def ready_state(optimizer: torch.optim.AdamW, tensor: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of a tensor, made as AdamW does before its first step."""
    state = optimizer.state[tensor]
    if "step" not in state:
        state |= {"step": torch.tensor(0.0), **{key: torch.zeros_like(tensor) for key in _MOMENTS}}
    return state


class Pace:
    """Holds entries of tensors back; `attach` puts it round every step of an AdamW.

    Args:
        periods: Tensor of the optimiser → steps between two moves of its entries, integer, broadcasts to it, 0 is
            never; others move at every step.
    """

    def __init__(self, periods: Mapping[Tensor, Tensor]):
        self._periods = dict(periods)
        self._slow = {tensor: bool((of > 1).any()) for tensor, of in periods.items()}
        self._kept: list[tuple[Tensor, Tensor, dict, Tensor, dict[str, Tensor]]] = []
        self._resting: list[tuple[Tensor, Tensor]] = []

    def attach(self, optimizer: torch.optim.AdamW) -> None:
        """Hold back from this optimiser's next step on."""
        optimizer.register_step_pre_hook(lambda *_: self._before(optimizer))
        optimizer.register_step_post_hook(lambda *_: self._after(optimizer))

    def _before(self, optimizer: torch.optim.AdamW) -> None:
        """Collect gradients, set those of this step, and keep what must not move."""
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor in self._periods and tensor.grad is not None:
                    self._hold(tensor, group, ready_state(optimizer, tensor))

    def _hold(self, tensor: Tensor, group: dict, state: dict[str, Tensor]) -> None:
        periods, step = self._periods[tensor], int(state["step"]) + 1
        moves = (periods > 0) & (step % periods.clamp(min=1) == 0)
        gradient = tensor.grad
        if self._slow[tensor]:
            collected = state.setdefault(COLLECTED, torch.zeros_like(tensor))
            collected += torch.where(periods > 1, gradient, 0)
            gradient = torch.where(periods > 1, collected / periods.clamp(min=1), gradient)
            collected.masked_fill_(moves, 0)
        if not moves.any():
            self._resting.append((tensor, tensor.grad))
            tensor.grad = None  # AdamW leaves it, its moments and its decay alone
            state["step"] += 1
            return
        tensor.grad.copy_(gradient)
        kept = {key: state[key].clone() for key in _MOMENTS}
        self._kept.append((tensor, moves, group, tensor.detach().clone(), kept))

    def _after(self, optimizer: torch.optim.AdamW) -> None:
        """Put back what rests, and let slow entries take the step of their own count."""
        for tensor, moves, group, weights, moments in self._kept:
            state, periods = optimizer.state[tensor], self._periods[tensor]
            moved = tensor.detach()
            if self._slow[tensor]:
                count = (int(state["step"]) // periods.clamp(min=1)).clamp(min=1)
                moved = torch.where(periods > 1, _step(weights, state, group, count), moved)
            tensor.data.copy_(torch.where(moves, moved, weights))
            for key, before in moments.items():
                state[key].copy_(torch.where(moves, state[key], before))
        for tensor, gradient in self._resting:
            tensor.grad = gradient
        self._kept.clear()
        self._resting.clear()


def _step(weights: Tensor, state: Mapping[str, Tensor], group: Mapping, count: Tensor) -> Tensor:
    """Return what AdamW makes of weights whose moments have been moved ``count`` times."""
    one, two = group["betas"]
    mean = state["exp_avg"] / (1 - one ** count.to(weights.dtype))
    spread = (state["exp_avg_sq"] / (1 - two ** count.to(weights.dtype))).sqrt() + group["eps"]
    return weights * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * mean / spread

"""Update frequencies: a group of parameters, or a single expert, moves every n-th step or never.

    θ ← AdamW(θ, mean of the last n gradients)  if n divides the step, else θ stays     (CMS, arXiv:2512.24695, eq. 71)

Fast groups take up what is new, slow ones average it, frozen ones keep what they are: a continuum of memories. What
does not move keeps its bits: weight decay and moments rest as well. The gradients of a slow group are collected between
its steps and are part of a checkpoint.

Experts of one projection are one parameter, so an expert that rests is put back after the optimiser's step. They share
AdamW's count of steps; a slow expert's first steps are therefore up to half as long as its rate says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fednested_lib.partition import group_of

Period = int | None | Sequence[int | None]
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


class Pace:
    """Holds parameters and experts back; `before` and `after` go round every step of an AdamW.

    Args:
        periods: Parameter name → period, or one per entry of its first dimension; others move at every step.
    """

    def __init__(self, periods: Mapping[str, Period]):
        self._periods, self._step = dict(periods), 0
        self._sums: dict[str, Tensor] = {}
        self._kept: list[tuple[nn.Parameter, list[int], Tensor, dict[str, Tensor]]] = []

    def before(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Collect gradients, set those of this step, and keep what must not move."""
        self._step += 1
        for name, period in self._periods.items():
            parameter = parameters[name]
            if parameter.grad is None:
                continue
            if isinstance(period, Sequence):
                self._before_experts(name, period, parameter, optimizer)
                continue
            collected = self._collected(name, parameter, slow=period not in (1, None))
            if not self._moves(period):
                parameter.grad = None  # AdamW leaves it, its moments and its decay alone
            elif period != 1:
                parameter.grad = collected / period
                collected.zero_()

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back the experts that rest."""
        for parameter, resting, weights, moments in self._kept:
            parameter.data[resting] = weights
            for key in _MOMENTS:
                optimizer.state[parameter][key][resting] = moments.get(key, torch.zeros_like(weights))
        self._kept.clear()

    def state(self) -> dict[str, Tensor]:
        """Return what the next step depends on."""
        return {"step": torch.tensor(self._step), **{f"sum.{name}": total for name, total in self._sums.items()}}

    def load_state(self, state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        """Go on from such a state."""
        self._step = int(state["step"])
        sums = {key.removeprefix("sum."): total for key, total in state.items() if key.startswith("sum.")}
        self._sums = {name: total.to(parameters[name].device, copy=True) for name, total in sums.items()}

    def _before_experts(
        self, name: str, periods: Sequence[int | None], parameter: nn.Parameter, optimizer: torch.optim.Optimizer
    ) -> None:
        collected = self._collected(name, parameter, slow=any(period not in (1, None) for period in periods))
        moving = [expert for expert, period in enumerate(periods) if self._moves(period)]
        resting = [expert for expert, period in enumerate(periods) if not self._moves(period)]
        if not moving:
            parameter.grad = None
            return
        for expert in moving:
            if periods[expert] != 1:
                parameter.grad[expert] = collected[expert] / periods[expert]
                collected[expert] = 0
        if resting:
            state = optimizer.state[parameter]  # empty before AdamW's first step
            moments = {key: state[key][resting].clone() for key in _MOMENTS if key in state}
            self._kept.append((parameter, resting, parameter.detach()[resting].clone(), moments))

    def _collected(self, name: str, parameter: nn.Parameter, *, slow: bool) -> Tensor | None:
        if not slow:
            return None
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(parameter)
        return self._sums[name].add_(parameter.grad)

    def _moves(self, period: int | None) -> bool:
        return period is not None and self._step % period == 0

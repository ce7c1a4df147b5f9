"""How one training step is computed and where the weights live.

`Backend` is the seam for engines. One process with plain torch is right up to some hundred million parameters, and in
tests; several ranks with it as long as weights and optimiser state fit each of them, else
`tier1/training/deepspeed_backend.py`. Both name the training state alike, so that one goes on where the other ended.
What is minimised is in `tier1/training/loss.py`, the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fednested_lib.partition import Group, group_of
from tier1.training.loss import Term, batch_loss
from tier1.training.ranks import ALONE, Ranks
from tier1.training.settings import ADAM_BETAS, TrainSettings

WEIGHTS, OPTIMIZER = "model.", "optimizer."


class Backend(Protocol):
    """How one step is computed and where the weights live."""

    @property
    def memory_remedy(self) -> str:
        """What holds less: the words of an error when weights or optimiser do not fit."""

    def prepare(self, model: nn.Module, settings: TrainSettings, family: str, ranks: Ranks) -> None:
        """Take the model over, the same on every rank; called once, before the first step."""

    def step(self, rows: Tensor, rate: float) -> float:
        """Take one optimiser step at ``rate`` times the peak rates; every rank calls it with its own share.

        Args:
            rows: int64 [batch / ranks, seq_len + 1] token ids.
            rate: Factor of the schedule, 0..1.

        Returns:
            Next-token loss of the global batch before the step. If loss or gradient is not finite: NaN on every rank,
            and no step is taken.
        """

    def grad_norm(self) -> float:
        """Return the last step's gradient norm over all parameters and ranks, before it was clipped."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights under the in-memory names of transformers; every rank calls it."""

    def training_state(self) -> dict[str, Tensor]:
        """Return weights and optimiser state by name: all that the next step depends on.

        Every rank calls it; rank 0's answer is the whole, and counts.
        """

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state, after `prepare`."""


class TorchBackend:
    """Plain torch: every rank holds the whole model, which is trained in place; ``terms`` are added to the loss."""

    memory_remedy = "cut weights and optimiser with core.deepspeed, core.deepspeed.offload"

    def __init__(self, terms: Sequence[Term] = ()):
        self._terms = tuple(terms)

    def prepare(self, model: nn.Module, settings: TrainSettings, family: str, ranks: Ranks = ALONE) -> None:
        """Take the model over."""
        self._model, self._settings, self._ranks = ready(model, settings).to(ranks.device), settings, ranks
        groups = parameter_groups(model, settings, family)
        self._peaks = [group["lr"] for group in groups]
        self._optimizer = torch.optim.AdamW(groups, betas=ADAM_BETAS)

    def step(self, rows: Tensor, rate: float) -> float:
        """Take one optimiser step; NaN and no step if loss or gradient is not finite."""
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        self._optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self._ranks.device)
        passes = rows.to(self._ranks.device).split(self._settings.rows_per_pass(self._ranks.world_size))
        for part in passes:
            total, of_part = batch_loss(self._model, part, self._settings, self._ranks, self._terms)
            (total / len(passes)).backward()
            loss += of_part / len(passes)
        self._ranks.mean_([p.grad for p in self._model.parameters() if p.grad is not None] + [loss])
        self._norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.grad_clip).item()
        if not (math.isfinite(loss.item()) and math.isfinite(self._norm)):
            return math.nan
        self._optimizer.step()
        return loss.item()

    def grad_norm(self) -> float:
        """Return the last step's gradient norm, before it was clipped."""
        return self._norm

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights, on the CPU."""
        return {name: tensor.detach().cpu() for name, tensor in self._model.state_dict().items()}

    def training_state(self) -> dict[str, Tensor]:
        """Return weights and AdamW's moments; tied weights count once."""
        state = {}
        for name, parameter in self._model.named_parameters():
            state[WEIGHTS + name] = parameter.detach()
            for key, tensor in self._optimizer.state[parameter].items():
                state[f"{OPTIMIZER}{key}.{name}"] = tensor
        return state

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        for name, parameter in self._model.named_parameters():
            parameter.data.copy_(state[WEIGHTS + name])
            self._optimizer.state[parameter] = {
                key: _on_device(key, state[f"{OPTIMIZER}{key}.{name}"], parameter)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{OPTIMIZER}{key}.{name}" in state  # a parameter that has not moved yet has none
            }


def _on_device(key: str, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    # AdamW counts its steps on the CPU, wherever the weights are.
    return tensor.clone() if key == "step" else tensor.to(parameter.device, copy=True)


def ready(model: nn.Module, settings: TrainSettings) -> nn.Module:
    """Return ``model`` made trainable as a whole."""
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train().requires_grad_(True)


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

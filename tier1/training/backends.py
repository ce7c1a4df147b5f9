"""How one training step is computed and where the weights live.

    L = CE(next token) + c_aux · L_aux,    L_aux = E · Σ_e f_e · P_e      (Switch Transformer, arXiv:2101.03961)

f_e is the share of tokens routed to expert e and P_e its mean router probability; without L_aux a few experts take all
tokens. On several ranks f_e is that of the global batch, for the product of two means is not the mean of the products:
with it, n ranks compute the gradient that one would.

`Backend` is the seam where another engine (DeepSpeed) comes in. One process with plain torch is right up to some
hundred million parameters, and in tests (DeepSpeed costs 1.3 to 2.1 times as much there); several ranks with it as long
as weights and optimiser state fit each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fednested_lib.partition import Group, group_of
from tier1.training.ranks import ALONE, Ranks
from tier1.training.settings import TrainSettings

_WEIGHTS, _OPTIMIZER = "model.", "optimizer."


class Backend(Protocol):
    """How one step is computed and where the weights live."""

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

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights under the in-memory names of transformers; every rank calls it."""

    def training_state(self) -> dict[str, Tensor]:
        """Return weights and optimiser state by name: all that the next step depends on; every rank calls it."""

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state, after `prepare`."""


class TorchBackend:
    """Plain torch: every rank holds the whole model, which is trained in place."""

    def prepare(self, model: nn.Module, settings: TrainSettings, family: str, ranks: Ranks = ALONE) -> None:
        """Take the model over."""
        self._model, self._settings, self._ranks = model.train().requires_grad_(True).to(ranks.device), settings, ranks
        groups = parameter_groups(model, settings, family)
        self._peaks = [group["lr"] for group in groups]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def step(self, rows: Tensor, rate: float) -> float:
        """Take one optimiser step; NaN and no step if loss or gradient is not finite."""
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        self._optimizer.zero_grad(set_to_none=True)
        rows = rows.to(self._ranks.device)
        output = self._model(input_ids=rows[:, :-1], output_router_logits=True, use_cache=False)
        loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), rows[:, 1:].flatten())
        aux = balancing_loss(output.router_logits, self._model.config.num_experts_per_tok, self._ranks)
        (loss + self._settings.aux_loss * aux).backward()
        loss = loss.detach()
        self._ranks.mean_([p.grad for p in self._model.parameters() if p.grad is not None] + [loss])
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.grad_clip)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            return math.nan
        self._optimizer.step()
        return loss.item()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights, on the CPU."""
        return {name: tensor.detach().cpu() for name, tensor in self._model.state_dict().items()}

    def training_state(self) -> dict[str, Tensor]:
        """Return weights and AdamW's moments; tied weights count once."""
        state = {}
        for name, parameter in self._model.named_parameters():
            state[_WEIGHTS + name] = parameter.detach()
            for key, tensor in self._optimizer.state[parameter].items():
                state[f"{_OPTIMIZER}{key}.{name}"] = tensor
        return state

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        for name, parameter in self._model.named_parameters():
            parameter.data.copy_(state[_WEIGHTS + name])
            self._optimizer.state[parameter] = {
                key: _on_device(key, state[f"{_OPTIMIZER}{key}.{name}"], parameter)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }


def _on_device(key: str, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    # AdamW counts its steps on the CPU, wherever the weights are.
    return tensor.clone() if key == "step" else tensor.to(parameter.device, copy=True)


def balancing_loss(router_logits: tuple[Tensor, ...], top_k: int, ranks: Ranks = ALONE) -> Tensor:
    """Return this rank's part of L_aux: its mean over the ranks, in value and gradient, is that of the global batch.

    Args:
        router_logits: [T, E] per layer.
        top_k: Experts per token.
        ranks: Those that share the batch; alone, the value is transformers' to the bit.

    Raises:
        TransportError: Another rank is gone.
    """
    n_experts, n_tokens = router_logits[0].shape[-1], sum(len(logits) for logits in router_logits)
    chosen, probability = 0.0, 0.0
    for logits in router_logits:
        weights = nn.functional.softmax(logits, dim=-1)
        experts = torch.topk(weights, top_k, dim=-1)[1].flatten()
        chosen = chosen + torch.bincount(experts, minlength=n_experts).float()
        probability = probability + weights.float().sum(dim=0)
    share = chosen / n_tokens
    ranks.mean_([share])
    return torch.sum(share * (probability / n_tokens)) * n_experts


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

"""Low-rank training at tier 1: the weights stay as they are, and a product of two small matrices is trained for each.

    W_eff = W + (α / r) · B·A,    A: [r, d_in] random, B: [d_out, r] zero at first         (LoRA, arXiv:2106.09685)

Of fused experts every expert has its own A and B. AdamW keeps moments of A and B alone, so its state falls from 8 bytes
per parameter to 8 · r · (d_in + d_out) per matrix. What is published is ΔW = (α / r) · B·A, dense, per slice: fold,
gate and replay see a core update like any other. Right where AdamW's state does not fit, or where a small change of few
degrees of freedom is wanted; W_eff is formed for every pass, so time and activations are those of the dense run.

With ``quantize`` the frozen targets are held as `fednested_lib.frozen` holds experts (QLoRA, arXiv:2305.14314, with
int4 blocks in the place of NF4), and backward forms W_eff again instead of keeping it: one layer is in fp32 at a time.
ΔW then also makes up for the error of Q(W), and is published for W itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fednested_lib.errors import ConfigError
from fednested_lib.frozen import Form, FrozenWeight
from fednested_lib.partition import group_of
from tier1.training.backends import OPTIMIZER, WEIGHTS, TorchBackend, ready
from tier1.training.lora_settings import LoraSettings
from tier1.training.ranks import ALONE, Ranks
from tier1.training.settings import ADAM_BETAS, TrainSettings


class LowRank(nn.Module):
    """The change of one weight [d_out, d_in], or of fused ones [E, d_out, d_in]."""

    def __init__(self, weight: Tensor, settings: LoraSettings, generator: torch.Generator):
        super().__init__()
        *fused, d_out, d_in = weight.shape
        a = torch.empty(*fused, settings.rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
        self.lora_a = nn.Parameter(a.to(weight))
        self.lora_b = nn.Parameter(weight.new_zeros(*fused, d_out, settings.rank))
        self._scale = settings.alpha / settings.rank

    def delta(self) -> Tensor:
        """Return (α / r) · B·A."""
        return self._scale * (self.lora_b @ self.lora_a)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the model computes with."""
        return weight + self.delta()


class QuantisedLowRank(LowRank):
    """The change of a weight that is held quantised; being a parametrisation, it takes the weight's place."""

    def __init__(self, weight: Tensor, settings: LoraSettings, generator: torch.Generator):
        super().__init__(weight, settings, generator)
        *fused, d_out, d_in = self._shape = weight.shape
        self.held = FrozenWeight((math.prod(fused), d_out, d_in), cast("Form", settings.quantize))

    def right_inverse(self, weight: Tensor) -> tuple[()]:
        """Take the weight over; nothing of it in fp32 is left to keep."""
        for number, matrix_fd in enumerate(weight.view(self.held.shape)):
            self.held[number] = matrix_fd
        return ()

    def forward(self) -> Tensor:
        """Return the weight that the model computes with."""
        n_experts, d_out, d_in = self.held.shape
        whole_edf = self.lora_a.new_empty(n_experts, d_in, d_out)
        for number, matrix_df in enumerate(whole_edf):
            self.held.dequantise(number, matrix_df)
        return self.delta() + whole_edf.transpose(1, 2).view(self._shape)


class LoraBackend(TorchBackend):
    """`TorchBackend` that trains low-rank factors; checkpoints hold these, the base is that of the run."""

    def __init__(self, settings: LoraSettings):
        super().__init__()
        self._lora = settings

    def prepare(self, model: nn.Module, settings: TrainSettings, family: str, ranks: Ranks = ALONE) -> None:
        """Take the model over.

        Raises:
            ConfigError: The model has none of a target, or one with a side below the rank.
        """
        self._model, self._settings, self._ranks = ready(model, settings).requires_grad_(False), settings, ranks
        self._names = list(model.state_dict())
        self._changes = attach(model, self._lora, settings.seed)
        model.to(ranks.device)  # only now: what is quantised need not fit there in fp32
        groups = [
            {"params": list(change.parameters()), "lr": settings.rate_of(group_of(name, family))}
            for name, change in self._changes.items()
        ]
        self._peaks = [group["lr"] for group in groups]
        self._optimizer = torch.optim.AdamW(groups, betas=ADAM_BETAS, weight_decay=settings.weight_decay)

    @property
    def memory_remedy(self) -> str:
        """What holds less of a frozen model: DeepSpeed does not go with low rank."""
        smaller = "lower core.lora.rank or name fewer core.lora.targets"
        return smaller if self._lora.quantize == "int4" else f"set core.lora.quantize to int4, {smaller}"

    @property
    def settings(self) -> LoraSettings:
        """What is trained in place of the weights."""
        return self._lora

    @torch.no_grad()
    def delta(self) -> dict[str, Tensor]:
        """Return ΔW by the in-memory names of transformers, on the CPU; weights that are no target are left out."""
        return {name: change.delta().cpu() for name, change in self._changes.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return W_eff, on the CPU: of a quantised target what the model computes with, Q(W) + ΔW."""
        return {name: _weight(self._model, name).detach().cpu() for name in self._names}

    def training_state(self) -> dict[str, Tensor]:
        """Return the factors and AdamW's moments of them."""
        state = {}
        for name, factor in self._factors().items():
            state[WEIGHTS + name] = factor.detach()
            state |= {f"{OPTIMIZER}{key}.{name}": tensor for key, tensor in self._optimizer.state[factor].items()}
        return state

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        for name, factor in self._factors().items():
            factor.data.copy_(state[WEIGHTS + name])
            moments = {key: state[f"{OPTIMIZER}{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[factor] = {key: t.to(factor.device, copy=True) for key, t in moments.items()}
            # AdamW counts its steps on the CPU, wherever the weights are.
            self._optimizer.state[factor]["step"] = state[f"{OPTIMIZER}step.{name}"].clone()

    def _factors(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{kind}": factor
            for name, change in self._changes.items()
            for kind, factor in change.named_parameters()
        }


def attach(model: nn.Module, settings: LoraSettings, seed: int) -> dict[str, LowRank]:
    """Give every target of ``model`` a trainable change and return them by the name of the weight.

    Raises:
        ConfigError: The model has none of a target, or one with a side below the rank.
    """
    found = [name for name, _ in model.named_parameters() if _target_of(name) in settings.targets]
    missing = sorted({*settings.targets} - {_target_of(name) for name in found})
    if missing:
        raise ConfigError(f"core.lora.targets must be weights of the model, got {', '.join(missing)}: leave it out")
    for name in found:
        _check(name, _weight(model, name), settings)
    kind, changes = LowRank if settings.quantize == "none" else QuantisedLowRank, {}
    for number, name in enumerate(found):
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)
        )
        changes[name] = kind(_weight(model, name), settings, generator)
        place, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(place), leaf, changes[name])
    if settings.quantize != "none":
        for place in {name.rpartition(".")[0] for name in found}:
            _recompute(model.get_submodule(place))
    return changes


def _check(name: str, weight: Tensor, settings: LoraSettings) -> None:
    if settings.rank > min(weight.shape[-2:]):
        raise ConfigError(
            f"core.lora.rank must be 1..{min(weight.shape[-2:])} for {name}, got {settings.rank}: lower it"
        )
    if settings.quantize == "int4" and weight.shape[-1] % 2:
        raise ConfigError(
            f"core.lora.quantize int4 needs an even number of inputs, {name} has {weight.shape[-1]}: choose bf16"
        )


def _recompute(module: nn.Module) -> None:
    """Have backward form a module's weights again, which autograd would keep in fp32 from forward to backward."""
    module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)


def _weight(model: nn.Module, name: str) -> Tensor:
    place, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(place), leaf)


def _target_of(name: str) -> str:
    """Return the projection that a parameter belongs to: ``….q_proj.weight``, ``….experts.down_proj``."""
    place, _, projection = name.removesuffix(".weight").rpartition(".")
    return projection if place.endswith((".self_attn", ".experts")) else ""

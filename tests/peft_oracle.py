"""The routed adapters' factors in peft's `target_parameters` LoRA: what outputs and gradients are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fednested_lib.adapters import RoutedAdapters
from fednested_lib.partition import PROJECTIONS, expert_name


def factors_of(adapters: RoutedAdapters) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return parameter name → (A, Bᵀ), padded."""
    return {
        expert_name(layer.layer, projection): layer.factors[projection]
        for layer in adapters._layers
        for projection in PROJECTIONS
    }


class PeftTwin:
    """A model wrapped by peft with copies of the same factors: all experts, zeros where ours has none.

    Args:
        model: of the same weights, without adapters; wrapped in place.
        adapters: attached to another one.
    """

    def __init__(self, model: nn.Module, adapters: RoutedAdapters):
        from peft import LoraConfig, get_peft_model

        spec, self.n_experts = adapters.spec, model.config.num_experts
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
        )
        self.rank, self.model = spec.rank, get_peft_model(model, config).eval()
        state = dict(self.model.named_parameters())
        self._pairs = {}
        for name, (lora_a, lora_b) in factors_of(adapters).items():
            layer, projection = name.split(".")[2], name.rsplit(".", 1)[1]
            inner = "base_layer." if projection == "gate_up_proj" else ""
            prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{inner}"
            a, b = state[f"{prefix}lora_A.default.weight"], state[f"{prefix}lora_B.default.weight"]
            ids = list(adapters.expert_ids[int(layer)])
            full_a = torch.zeros(self.n_experts, self.rank, lora_a.shape[2])
            full_b = torch.zeros(self.n_experts, self.rank, lora_b.shape[2])
            full_a[ids], full_b[ids] = lora_a.detach()[:, : self.rank], lora_b.detach()[:, : self.rank]
            a.data = full_a.reshape(-1, full_a.shape[2])
            b.data = full_b.permute(2, 1, 0).reshape(full_b.shape[2], -1)
            self._pairs[name] = (a, b, ids)

    def gradients(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the gradients of A and Bᵀ [n, r, ·] of one parameter, of the experts adapted by ours."""
        a, b, ids = self._pairs[name]
        return (
            a.grad.reshape(self.n_experts, self.rank, -1)[ids],
            b.grad.reshape(-1, self.rank, self.n_experts).permute(2, 1, 0)[ids],
        )

"""Expert parallelism through DeepSpeed's AutoEP, and the names that its layers hide.

AutoEP replaces each MoE block: rank r of a group of n holds experts r·E/n … (r+1)·E/n − 1, gate and up apart.

    model.layers.0.mlp.gate.weight            ↔  …mlp.router.gate.weight                 on every rank
    model.layers.0.mlp.experts.gate_up_proj   ↔  cat over ranks of [experts.w1; experts.w3]
    model.layers.0.mlp.experts.down_proj      ↔  cat over ranks of experts.w2

Importing this module imports neither torch nor deepspeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Part:
    """What this rank holds of one parameter of transformers.

    Args:
        pieces: One parameter; of a fused projection, those that follow each other along dimension 1.
        group: The ranks whose pieces follow each other along dimension 0; None: each has all.
    """

    pieces: tuple[nn.Parameter, ...]
    group: Any = None

    def assemble(self, mine: list[Tensor]) -> Tensor:
        """Return the whole of what every rank of the group has of each piece."""
        import torch
        import torch.distributed as dist

        fused = torch.cat(mine, dim=1) if len(mine) > 1 else mine[0]
        if self.group is None:
            return fused
        gathered = [torch.empty_like(fused) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, fused.contiguous(), group=self.group)
        return torch.cat(gathered)

    def cut(self, whole: Tensor) -> list[Tensor]:
        """Return this rank's share of a whole tensor, a tensor per piece."""
        import torch.distributed as dist

        if self.group is not None:
            whole = whole.chunk(dist.get_world_size(self.group))[dist.get_rank(self.group)]
        return list(whole.chunk(len(self.pieces), dim=1)) if len(self.pieces) > 1 else [whole]


def parts_of(module: nn.Module) -> dict[str, Part]:
    """Return transformers' name → what this rank holds of it; every rank in the same order."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    parts: dict[str, Part] = {}
    layers = {name + ".": layer for name, layer in module.named_modules() if isinstance(layer, AutoEPMoELayer)}
    for prefix, layer in layers.items():
        experts = layer.experts
        parts[prefix + "gate.weight"] = Part(pieces=(layer.router.gate.weight,))
        parts[prefix + "experts.gate_up_proj"] = Part(pieces=(experts.w1, experts.w3), group=layer.ep_group)
        parts[prefix + "experts.down_proj"] = Part(pieces=(experts.w2,), group=layer.ep_group)
    for name, parameter in module.named_parameters():
        if not any(name.startswith(prefix) for prefix in layers):
            parts[name] = Part(pieces=(parameter,))
    return parts


@contextmanager
def registry_by_name() -> Iterator[None]:
    """Let AutoEP look up transformers' registry of recorded outputs by the name of a class, as it was up to 5.22.

    transformers 5.23 asks for the model itself, by `get(model)`; DeepSpeed 0.19.8 says `get(name, default)` and
    `registry[name] = …`. Where the registry answers that, as it is or with a fixed release, nothing is changed.
    """
    from transformers.utils import output_capturing

    registry = output_capturing._CAN_RECORD_REGISTRY
    original = type(registry)
    missing = object()
    try:
        answers = registry.get("no class", missing) is missing
    except TypeError:
        answers = False
    if answers:
        yield
        return

    class ByNameToo(original):
        def get(self, key: Any, *default: Any) -> Any:
            return dict.get(self, key, *default) if isinstance(key, str) else super().get(key)

        def __setitem__(self, key: Any, value: Any) -> None:
            if isinstance(key, str):
                dict.__setitem__(self, key, value)
            else:
                super().__setitem__(key, value)

    registry.__class__ = ByNameToo
    try:
        yield
    finally:
        registry.__class__ = original

"""A bias per expert on the router's logits that trains on the device and never leaves it.

    p = softmax(W·x + b), top-k of p        b [E] per layer, zero at first

The router itself stays frozen, so that all clients mean the same expert by the same number; b fits the routing to this
device's text. It is no part of a delta: no spooled file, payload or event has a place for it. What a device declares is
how many tokens its own routing sent where.

It goes on from update to update of one base version and starts from zero with the next. The file holds it before and
after the newest update, so that an update which is made again starts from the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from fednested_lib.blobs import write_durable
from fednested_lib.envelope import Digest, Layer
from fednested_lib.errors import ContractError, StorageError
from fednested_lib.signing import canonical_json

_Values = dict[Layer, list[float]]


class RouterBias:
    """The biases of one model; put on with hooks, taken off with `detach`.

    Args:
        model: transformers MoE model whose routers are `….mlp.gate` with `weight` [E, D] and `top_k`.

    Raises:
        ContractError: it has no such router.
    """

    def __init__(self, model: nn.Module):
        self.bias: dict[int, nn.Parameter] = {}
        self._hooks = []
        for name, module in model.named_modules():
            if not (name.endswith(".mlp.gate") and hasattr(module, "top_k") and hasattr(module, "num_experts")):
                continue
            bias = nn.Parameter(torch.zeros(module.num_experts, device=module.weight.device))
            self.bias[int(name.split(".")[-3])] = bias
            self._hooks.append(module.register_forward_hook(lambda gate, _args, out, b=bias: _routed(gate, out[0], b)))
        if not self.bias:
            raise ContractError(
                "unsupported_router", f"{type(model).__name__} has no top-k router: set adapters.router_bias to false"
            )

    def values(self) -> dict[int, list[float]]:
        """Return layer → b."""
        return {layer: bias.detach().cpu().tolist() for layer, bias in self.bias.items()}

    def load(self, values: dict[int, list[float]]) -> None:
        """Set b; layers that are not given get zeros."""
        with torch.no_grad():
            for layer, bias in self.bias.items():
                bias.copy_(torch.tensor(values.get(layer, [0.0] * len(bias))))

    def detach(self) -> None:
        """Take the biases off: the model routes as before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _routed(gate: nn.Module, logits_ne: Tensor, bias_e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do what the router does, with biased logits (transformers 5: Mixtral always normalises, others say)."""
    logits_ne = logits_ne + bias_e.to(logits_ne)
    top_nk, index_nk = torch.topk(torch.softmax(logits_ne.float(), dim=-1), gate.top_k, dim=-1)
    if getattr(gate, "norm_topk_prob", True):
        top_nk = top_nk / top_nk.sum(dim=-1, keepdim=True)
    return logits_ne, top_nk.to(logits_ne.dtype), index_nk


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    base_digest: Digest
    sequence: int = Field(ge=0)
    before: _Values
    after: _Values


def load_bias(path: Path, base_digest: str, sequence: int) -> dict[int, list[float]]:
    """Return what an update starts from: nothing on a new base version.

    Raises:
        StorageError: the file was altered or cannot be read.
    """
    try:
        kept = _File.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise StorageError(f"router bias {path} is unusable ({type(error).__name__}): remove it") from None
    if kept.base_digest != base_digest or kept.sequence > sequence:
        return {}
    values = kept.before if kept.sequence == sequence else kept.after
    return {int(layer): each for layer, each in values.items()}


def keep_bias(
    path: Path, base_digest: str, sequence: int, *, before: dict[int, list[float]], after: dict[int, list[float]]
) -> None:
    """Write what an update started from and what it came to.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    texts = [{str(layer): each for layer, each in values.items()} for values in (before, after)]
    kept = _File(base_digest=base_digest, sequence=sequence, before=texts[0], after=texts[1])
    write_durable(path, canonical_json(kept.model_dump(mode="json")))

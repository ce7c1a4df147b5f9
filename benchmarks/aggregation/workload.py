"""The adapters that every side is given: the same numbers, written once, read by both.

The large shape has the 12,008 tensors that NVFlare loads in its LoRA run of a 30B-A3B MoE (`integration/nemo/examples/
peft/README.md`). Counted (our arithmetic): 23 MoE layers × 128 experts × 2 projections × 2 factors = 11,776, and 232 of
attention, Mamba and shared experts. fednested's devices adapt routed experts alone, so 58 experts of a 24th layer
(58 × 2 × 2 = 232) stand in for those: 3,002 experts, 12,008 tensors. Scaled are the widths, not the counts: hidden size
176 and expert width 68 at rank 16, so that the content is 106.8 MB of fp32, what the real widths (2,688 and 1,856) have
at rank 1 (107.0 MB without the 232); a base model of the real widths would be 118 GB.

The small shape is 4 layers × 8 experts, all adapted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors
from fednested_lib.partition import expert_name, expert_param

ALPHA = 16.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and how much of it an update adapts.

    Args:
        layers: MoE layers.
        experts: per layer.
        last: adapted experts of the last layer; the other layers are adapted whole.
        hidden: model width.
        width: of an expert.
        rank: of the adapter.
    """

    layers: int
    experts: int
    last: int
    hidden: int
    width: int
    rank: int

    @property
    def model(self) -> dict[str, object]:
        """The model config that expert shapes follow from."""
        return {
            "model_type": "qwen3_moe",
            "num_experts": self.experts,
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.width,
            "num_hidden_layers": self.layers,
        }

    @property
    def params(self) -> dict[str, tuple[int, int, int]]:
        """(experts, d_out, d_in) of every fused expert parameter."""
        each = {"gate_up_proj": (2 * self.width, self.hidden), "down_proj": (self.hidden, self.width)}
        return {
            expert_name(layer, projection): (self.experts, *dims)
            for layer in range(self.layers)
            for projection, dims in each.items()
        }

    def adapted(self, layer: int) -> tuple[int, ...]:
        """Return the adapted experts of a layer."""
        return tuple(range(self.last if layer == self.layers - 1 else self.experts))

    @property
    def n_tensors(self) -> int:
        """Tensors when every expert matrix has an A and a B of its own."""
        return 2 * sum(len(self.adapted(expert_param(name)[0])) for name in self.params)

    @property
    def fp32_bytes(self) -> int:
        """Bytes of one update as plain fp32."""
        numbers = sum(
            len(self.adapted(expert_param(name)[0])) * self.rank * (d_out + d_in)
            for name, (_, d_out, d_in) in self.params.items()
        )
        return 4 * numbers


LARGE = Shape(layers=24, experts=128, last=58, hidden=176, width=68, rank=16)
SMALL = Shape(layers=4, experts=8, last=8, hidden=512, width=384, rank=8)


def make_delta(shape: Shape, client: int) -> Delta:
    """Draw the update of one client: normal factors, about 1e-2 in A·B's entries as training leaves them."""
    rng = np.random.default_rng(client)
    factors = {}
    for name, (_, d_out, d_in) in shape.params.items():
        ids = shape.adapted(expert_param(name)[0])
        factors[name] = ExpertFactors(
            expert_ids=ids,
            lora_a=rng.standard_normal((len(ids), shape.rank, d_in), dtype=np.float32) * np.float32(0.02),
            lora_b=rng.standard_normal((len(ids), d_out, shape.rank), dtype=np.float32) * np.float32(0.02),
        )
    return Delta(spec=AdapterSpec(rank=shape.rank, alpha=ALPHA), factors=factors)


def write(shape: Shape, client: int, path: Path) -> None:
    """Write the stacked factors of one client as one .npz; the peers split them by expert, which is not timed."""
    delta = make_delta(shape, client)
    np.savez(
        path,
        **{
            f"{name}|{factor}": getattr(factors, factor)
            for name, factors in delta.factors.items()
            for factor in ("lora_a", "lora_b")
        },
    )


def read(shape: Shape, path: Path) -> Delta:
    """Read what `write` wrote."""
    with np.load(path) as stored:
        factors = {
            name: ExpertFactors(
                expert_ids=shape.adapted(expert_param(name)[0]),
                lora_a=stored[f"{name}|lora_a"],
                lora_b=stored[f"{name}|lora_b"],
            )
            for name in shape.params
        }
    return Delta(spec=AdapterSpec(rank=shape.rank, alpha=ALPHA), factors=factors)

"""What one device update costs on the wire, at the demo's shapes."""

from __future__ import annotations

import numpy as np

from benchmarks.registry import figure
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, encode

LAYERS, EXPERTS, HIDDEN, INTER, RANK = 4, 8, 128, 192, 8


def demo_delta() -> Delta:
    """Make a delta of the demo's shapes with Gaussian factors, which zstd cannot shrink."""
    rng = np.random.default_rng(0)
    shapes = {"gate_up_proj": (2 * INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
    factors = {
        f"model.layers.{layer}.mlp.experts.{projection}": ExpertFactors(
            expert_ids=tuple(range(EXPERTS)),
            lora_a=rng.standard_normal((EXPERTS, RANK, d_in)).astype(np.float32),
            lora_b=rng.standard_normal((EXPERTS, d_out, RANK)).astype(np.float32),
        )
        for layer in range(LAYERS)
        for projection, (d_out, d_in) in shapes.items()
    }
    return Delta(spec=AdapterSpec(rank=RANK, alpha=16.0), factors=factors)


@figure("update.bytes", unit="kB")
def update_bytes() -> float:
    """Payload of one device update of the demo, int8, all experts."""
    return len(encode(demo_delta(), seed=1)) / 1000


@figure("update.share", unit="%", bound="<= 27")
def update_share() -> float:
    """The same payload as a share of the fp32 adapters."""
    delta = demo_delta()
    return 100 * len(encode(delta, seed=1)) / delta.size_fp32_bytes


@figure("update.share_int4", unit="%", bound="<= 14")
def update_share_int4() -> float:
    """The same in int4."""
    delta = demo_delta()
    return 100 * len(encode(delta, encoding="int4", seed=1)) / delta.size_fp32_bytes

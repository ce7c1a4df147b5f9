"""What low-rank training at tier 1 is told; `tier1/training/lora.py` does it. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
Quantised = Literal["none", "int4", "bf16"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What is trained in place of the weights.

    Args:
        rank: r, ≥ 1, at most the smaller side of every target.
        alpha: α of the scale α / r.
        targets: Which weights: projections of the attention, and those of the experts.
        quantize: What the frozen targets are held in while the factors are trained; ``none`` is fp32.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[Target, ...] = TARGETS
    quantize: Quantised = "none"

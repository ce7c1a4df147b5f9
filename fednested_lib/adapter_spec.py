"""What describes an adapter and the encoding of its factors: words and bounds, without the numbers (`delta.py`).

Apart from `delta.py` because a process that only names adapters, as the sidecar at rest, needs no numpy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fednested_lib.errors import PayloadError

Encoding = Literal["fp32", "fp16", "int8", "int4"]
Mode = Literal["lora", "fixed_a"]
ENCODINGS: tuple[str, ...] = ("fp32", "fp16", "int8", "int4")
MAX_RANK = 256
INT4_LEVELS = 7  # of rounding to int4, on either side of zero


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Shape of an adapter: `rank` r in 1..256, `alpha` α > 0; the delta is scaled by α/r.

    `seed` belongs to mode `fixed_a` and to no other: 0 ≤ seed < 2**128, as 32 hex digits.
    """

    rank: int
    alpha: float
    mode: Mode = "lora"
    seed: str | None = None

    def __post_init__(self):
        if not 1 <= self.rank <= MAX_RANK:
            raise PayloadError("bad_rank", f"LoRA rank must be 1..{MAX_RANK}, got {self.rank}: set adapters.rank")
        if not 0 < self.alpha < float("inf"):
            raise PayloadError(
                "bad_alpha", f"LoRA alpha must be a finite number > 0, got {self.alpha}: set adapters.alpha"
            )

        if (self.mode == "fixed_a") != (self.seed is not None):
            raise PayloadError(
                "bad_seed", f"adapter mode {self.mode} with seed {self.seed}: mode fixed_a needs a seed, lora has none"
            )
        if self.seed is not None and not re.fullmatch("[0-9a-f]{32}", self.seed):
            raise PayloadError("bad_seed", f"seed must be 32 hex digits, got {str(self.seed)[:40]!r}: draw another")

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank

"""How the learning rate goes over a run: a factor on the peak rates, a function of the step alone.

    warm-up   s / S_w                                                     until step S_w = warmup · S, at least one
    constant  1
    linear    1 − (1 − f)·x
    cosine    f + (1 − f)·(1 + cos πx) / 2                                (SGDR, arXiv:1608.03983)
    wsd       1, then 1 − (1 − f)·y over the last decay · S steps         (MiniCPM, arXiv:2404.06395, section 4)

x is the share of the steps after warm-up that are over, y that of the last ones, f the final rate. Beyond the end the
factor stays f. Cosine is for a length that is known; wsd where a run may go on from before its last steps with more
data; constant for updates so short that each would only warm up and fall again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Shape of the learning rate.

    Args:
        kind: Of what follows the warm-up.
        warmup: Share of the steps with a rising rate, 0..1; the first step at least.
        final: Factor at the end, 0..1, unless ``kind`` is ``constant``.
        decay: Share of the steps that fall at the end of ``wsd``, 0..1 − ``warmup``.
    """

    kind: Kind = "cosine"
    warmup: float = 0.05
    final: float = 0.1
    decay: float = 0.2

    def factor(self, step: int, steps: int) -> float:
        """Return the factor on the peak rates.

        Args:
            step: From 1; may lie beyond ``steps``.
            steps: Length of the schedule, ≥ 1.
        """
        rising = max(1, round(self.warmup * steps))
        if step <= rising:
            return step / rising
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            falling = min(max(1, round(self.decay * steps)), max(1, steps - rising))
            over = (step - (steps - falling)) / falling
        else:
            over = (step - rising) / max(1, steps - rising)
        over = min(1.0, max(0.0, over))
        if self.kind == "cosine":
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * over))
        return 1 - (1 - self.final) * over

"""How fast a run is and what it takes: tokens per second, memory, and the share of the GPUs' arithmetic that is used.

    MFU = 6 · N_active · tokens/s / (ranks · peak)        (PaLM, arXiv:2204.02311, appendix B; attention left out)

N_active counts of each layer's experts the top-k that a token goes to.
"""

from __future__ import annotations

import resource
import time
from copy import copy
from dataclasses import dataclass

import torch
from torch import nn

from fednested_lib.partition import group_of
from tier1.training.ranks import Ranks

# Dense bf16 FLOP/s by the maker's data sheet; of others, CPUs included, a peak must be declared.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured; memory is the peak of this rank (of a GPU: the GPU's)."""

    tokens_per_s: float
    memory_mib: float
    mfu: float | None


class Meter:
    """Counts from its making on; every rank may have one. ``peak_flops``: of one rank, if declared."""

    def __init__(self, model: nn.Module, family: str, ranks: Ranks, peak_flops: float | None = None):
        self._active, self._ranks = active_parameters(model, family), ranks
        self._declared = peak_flops
        self._tokens, self._started = 0, time.monotonic()

    def again(self) -> Meter:
        """Return a meter of the same run that counts from now."""
        other = copy(self)
        other._tokens, other._started = 0, time.monotonic()
        return other

    def count(self, tokens: int) -> None:
        """Add the tokens of one step, over all ranks."""
        self._tokens += tokens

    def read(self) -> Speed:
        """Return the means since the beginning."""
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        peak = self._peak()
        mfu = 6 * self._active * rate / (self._ranks.world_size * peak) if peak else None
        mfu = mfu and float(f"{mfu:.4g}")
        return Speed(tokens_per_s=round(rate, 1), memory_mib=round(self._memory_mib(), 1), mfu=mfu)

    def _peak(self) -> float | None:
        if self._declared or self._ranks.device == "cpu":
            return self._declared
        name = torch.cuda.get_device_name(self._ranks.device)
        return next((peak for known, peak in PEAKS.items() if known in name), None)

    def _memory_mib(self) -> float:
        if self._ranks.device == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return torch.cuda.max_memory_allocated(self._ranks.device) / 2**20


def active_parameters(model: nn.Module, family: str) -> float:
    """Return how many parameters a token meets; call before an engine takes the model over."""
    config = model.config
    share = config.num_experts_per_tok / (getattr(config, "num_experts", None) or config.num_local_experts)
    return sum(p.numel() * (share if group_of(n, family) == "experts" else 1.0) for n, p in model.named_parameters())

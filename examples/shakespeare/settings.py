"""Sizes of the demo: chosen by measurement so that two cores finish in minutes and the learning shows.

Devices: 12 AdamW steps of 8 × 96 tokens at 8e-3 per update; on three seeds one round of these stays stable with
η_T2 = 1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What one demo run is made of."""

    seed: int = 0
    rounds: int = 3
    n_devices: int = 7
    slow_pace_s: float = 25.0  # how long the slow device sits on an update: longer than a round
    bootstrap_steps: int = 600
    bootstrap_batch: int = 8
    bootstrap_rate: float = 3e-3
    threads: int = 1  # a second one gains little and loses much when a core is shared
    late_core_steps: int = 60  # a second core update, trained from version 1 while the rounds move head on
    late_core_eta: float = 0.25
    local_steps: int = 12
    local_batch: int = 8
    local_rate: float = 8e-3
    rank: int = 8
    alpha: float = 16.0
    seq_len: int = 96
    max_regression: float = 0.15
    suite_tokens: int = 2048
    max_wait_s: float = 90.0

    @property
    def window(self) -> int:
        """Updates a round waits for: everybody but the slow device."""
        return self.n_devices - 1

"""Five domains in sequence, item 3 of issue 6: with safeguards a core update forgets little and learns what is new."""

from __future__ import annotations

from statistics import fmean

from benchmarks.forgetting import CLAIMED_ON, Remembered, kept_gains, mean_forgetting, sequence
from benchmarks.registry import Reading, figure

LEAST = 0.001  # what a sequence that forgets nothing is counted as, so that a ratio stays a number


@figure("forgetting.mean_with", unit="%", bound="<= 5", cls="full")
def mean_with() -> Reading:
    """Share of its gain that an older domain loses over five domains in sequence, replay and distillation, 3 seeds."""
    shares = [100 * one.forgetting for one in _runs("composed")]
    return Reading(value=fmean(shares), low=min(shares), high=max(shares))


@figure("forgetting.ratio", unit="1", bound=">= 5", cls="full")
def ratio() -> float:
    """How many times more the same sequences forget without safeguards, means of 3 seeds."""
    return mean_forgetting(_runs("none")) / max(LEAST, mean_forgetting(_runs("composed")))


@figure("forgetting.newest_gain_kept", unit="%", bound=">= 95", cls="full")
def newest_gain_kept() -> Reading:
    """Share of the newest domain's gain that is there with safeguards too, median of 3 seeds."""
    return Reading.of(kept_gains(_runs("composed"), _runs("none")))


def _runs(variant: str) -> list[Remembered]:
    return [sequence(variant, seed) for seed in CLAIMED_ON]

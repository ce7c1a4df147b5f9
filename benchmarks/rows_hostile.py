"""Hostile devices: item 7 of issue 3, three of ten on five seeds; `python -m benchmarks.hostile` prints every run.

The default pipeline was chosen on seeds 0 to 4, so it is judged on others.
"""

from __future__ import annotations

import logging
from functools import cache

import structlog

from benchmarks.hostile import Results, measure
from benchmarks.registry import figure

SEEDS = (5, 6, 7, 8, 9)


@cache
def results() -> tuple[Results, ...]:
    """Play all attacks on all seeds, with the settings of a new federation."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        return tuple(measure(seed) for seed in SEEDS)
    finally:
        structlog.configure(**before)


def mean(losses: list[float]) -> float:
    """Return the mean over seeds."""
    return sum(losses) / len(losses)


@figure("hostile.kept", unit="%", bound=">= 90", cls="full")
def kept() -> float:
    """Gain over the base kept with 3 of 10 devices hostile, of the clean run's: worst of 10 attacks and 5 seeds."""
    return min(each.worst for each in results())


@figure("hostile.clean_kept", unit="%", bound=">= 98", cls="full")
def clean_kept() -> float:
    """Gain of the default pipeline without attackers, of the weighted mean's: worst of 5 seeds."""
    return min(each.clean_kept for each in results())


@figure("hostile.nan_versions", unit="1", bound="== 0", cls="full")
def nan_versions() -> float:
    """Versions with a NaN or an infinity in their weights, over all attacks and seeds."""
    return sum(outcome.non_finite for each in results() for outcome in each.outcomes)


@figure("hostile.loss_base", unit="nats", cls="full")
def loss_base() -> float:
    """Held-out loss of the honest devices before the first round, mean of 5 seeds."""
    return mean([each.clean.base for each in results()])


@figure("hostile.loss_clean", unit="nats", cls="full")
def loss_clean() -> float:
    """The same after three rounds without attackers."""
    return mean([each.clean.loss for each in results()])


@figure("hostile.loss_attacked", unit="nats", cls="full")
def loss_attacked() -> float:
    """The same after three rounds under the attack that leaves least."""
    return mean([each.attacked[min(each.attacked, key=each.kept)].loss for each in results()])

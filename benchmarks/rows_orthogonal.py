"""Domains of devices one after the other, with and without protected directions (issue 6, "No forgetting")."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache

from benchmarks.forgetting import Remembered, kept_gains
from benchmarks.registry import Reading, figure
from benchmarks.results import ROOT


@figure("orthogonal.forgetting_ratio", unit="1", bound=">= 1.5", cls="long")
def forgetting_ratio() -> Reading:
    """How many times more four domains of devices in turn forget without protected directions, median of 3 seeds."""
    return Reading.of(_ratios("none"))


@figure("orthogonal.newest_gain_kept", unit="%", cls="long")
def newest_gain_kept() -> Reading:
    """Share of the newest domain's gain that is there with protected directions too, median of 3 seeds."""
    return Reading.of(_kept("orthogonal"))


@figure("orthogonal.against_smaller_steps", unit="1", cls="long")
def against_smaller_steps() -> Reading:
    """How many times more the same folds forget that take smaller steps instead of protecting directions."""
    return Reading.of(_ratios("smaller steps"))


@figure("orthogonal.smaller_steps_gain_kept", unit="%", cls="long")
def smaller_steps_gain_kept() -> Reading:
    """What those smaller steps keep of the newest domain's gain: the ratio above is fair where this is the same."""
    return Reading.of(_kept("smaller steps"))


def _ratios(other: str) -> list[float]:
    return _each(lambda rows: rows[other].forgetting / rows["orthogonal"].forgetting)


def _kept(variant: str) -> list[float]:
    return _each(lambda rows: kept_gains([rows[variant]], [rows["none"]])[0])


def _each(judged: Callable[[dict[str, Remembered]], float]) -> list[float]:
    return [judged(rows) for rows in _measured()]


@cache
def _measured() -> list[dict[str, Remembered]]:
    """Return, per seed, what every variant remembered; measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.orthogonal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    return [{name: Remembered(**row) for name, row in rows.items()} for rows in found]

"""Does asynchrony pay: item 9 of issue 3. A simulation runs in a process of its own, one for both default kinds."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

from benchmarks.registry import Reading, figure
from benchmarks.results import ROOT


@cache
def speed_ups(*kinds: str) -> dict[str, list[float]]:
    """Return kind (default: `steps` and `heavy_tail`) → asynchronous over synchronous speed, one per seed."""
    command = [sys.executable, "-m", "benchmarks.asynchrony", *kinds]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


@figure("asynchrony.steps", unit="x", bound=">= 2.0", cls="full")
def steps() -> Reading:
    """Asynchronous speed to the loss of 8 rounds, 16 devices of 100..400 s, 5 local steps, equal step size, 3 seeds."""
    return Reading.of(speed_ups()["steps"])


@figure("asynchrony.steps_tuned", unit="x", bound=">= 2.0", cls="long")
def steps_tuned() -> Reading:
    """The same, each way with the best of η_T2 = 1, 2 and 4 for it."""
    return Reading.of(speed_ups("steps_tuned")["steps_tuned"])


@figure("asynchrony.heavy_tail", unit="x", bound=">= 3.3", cls="full")
def heavy_tail() -> Reading:
    """As asynchrony.steps, with lognormal durations, σ = 1.5, drawn anew for every update."""
    return Reading.of(speed_ups()["heavy_tail"])

"""Does asynchrony pay: item 9 of issue 3. The simulation runs once, in a process of its own, for both rows."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

from benchmarks.registry import Reading, figure
from benchmarks.results import ROOT


@cache
def speed_ups() -> dict[str, list[float]]:
    """Return kind of durations → asynchronous over synchronous speed, one per seed."""
    command = [sys.executable, "-m", "benchmarks.asynchrony"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


@figure("asynchrony.steps", unit="x", bound=">= 2.0", cls="full")
def steps() -> Reading:
    """Asynchronous speed to the loss of 8 synchronous rounds, 16 devices of 100, 200 or 400 s per update, 3 seeds."""
    return Reading.of(speed_ups()["steps"])


@figure("asynchrony.heavy_tail", unit="x", bound=">= 3.3", cls="full")
def heavy_tail() -> Reading:
    """The same with lognormal durations, σ = 1.5, drawn anew for every update."""
    return Reading.of(speed_ups()["heavy_tail"])

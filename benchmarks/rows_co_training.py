"""Core updates with others: several clusters (item 4 of issue 6), and device folds in turn with them (item 5)."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

from benchmarks.registry import Reading, figure
from benchmarks.results import ROOT


@cache
def measured(module: str) -> list[Any]:
    """Return what a benchmark prints for its seeds, in a process of its own: `co_training` or `alternating`."""
    command = [sys.executable, "-m", f"benchmarks.{module}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


@figure("outer.gain_kept", unit="%", bound=">= 95", cls="full")
def gain_kept() -> Reading:
    """Gain of two clusters that meet every 50 steps, of the gain of one with twice the batch, equal tokens, 3 seeds."""
    return Reading.of([row["kept"] for row in measured("co_training")])


@figure("outer.traffic", unit="%", bound="<= 2", cls="full")
def traffic() -> Reading:
    """Bytes that two clusters publish and fetch, of those that two ranks send and receive for gradients every step."""
    return Reading.of([row["traffic"] for row in measured("co_training")])


@figure("alternating.device_change", unit="nats", bound="<= 0", cls="full")
def device_change() -> Reading:
    """Change of the devices' held-out loss over 10 versions, core updates and device folds in turn, 3 seeds."""
    return Reading.of([rows[-1]["device"] - rows[0]["device"] for rows in measured("alternating")])


@figure("alternating.tier1_change", unit="nats", bound="<= 0", cls="full")
def tier1_change() -> Reading:
    """Change of the held-out loss of tier 1's domain over the same 10 versions."""
    return Reading.of([rows[-1]["tier1"] - rows[0]["tier1"] for rows in measured("alternating")])


@figure("alternating.largest_rise", unit="nats", bound="<= 0.05", cls="full")
def largest_rise() -> Reading:
    """Largest rise of either domain's held-out loss in one of the 10 versions; the gate's bound is 0.05."""
    return Reading.of([_largest_rise(rows) for rows in measured("alternating")])


@figure("alternating.rank_kept", unit="1", bound=">= 0.8", cls="full")
def rank_kept() -> Reading:
    """Smallest effective rank of a device fold over that of the first, devices of ranks 2, 4 and 8."""
    ranks = [[row["rank"] for row in rows if row["rank"] is not None] for rows in measured("alternating")]
    return Reading.of([min(each) / each[0] for each in ranks])


@figure("alternating.dead_experts", unit="%", bound="== 0", cls="full")
def dead_experts() -> float:
    """Share of experts with less than 1/(10·E) of their layer's routed tokens after the 10 versions, the worst seed."""
    return 100 * max(rows[-1]["dead"] for rows in measured("alternating"))


def _largest_rise(rows: list[dict[str, Any]]) -> float:
    pairs = zip(rows, rows[1:], strict=False)
    return max(after[domain] - before[domain] for before, after in pairs for domain in ("device", "tier1"))

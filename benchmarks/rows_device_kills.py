"""The campaign of kills over a device's two processes as figures: one campaign, read by every row."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from benchmarks.device_kills import FAILPOINTS, Found, run_campaign
from benchmarks.registry import figure


@cache
def campaign(kills: int = 100) -> Found:
    """Run a campaign once and print it, its seed included."""
    with tempfile.TemporaryDirectory() as directory:
        found = run_campaign(Path(directory), kills=kills)
    print(found)
    return found


@figure("device_kills.kills", unit="1", bound=">= 100", cls="long")
def device_kills_kills() -> float:
    """SIGKILLs of sidecar and trainer at named failpoints, real training, a real broker killed halfway."""
    return campaign().kills.total()


@figure("device_kills.failpoints", unit="%", bound="== 100", cls="long")
def device_kills_failpoints() -> float:
    """Named failpoints of the two processes at which one died."""
    return 100 * (1 - len(campaign().missed) / sum(map(len, FAILPOINTS.values())))


@figure("device_kills.exactly_once", unit="%", bound="== 100", cls="long")
def device_kills_exactly_once() -> float:
    """Updates of the killed devices that are in the chain exactly once, the broker's lost end included."""
    return campaign().exactly_once


@figure("device_kills.in_order", unit="%", bound="== 100", cls="long")
def device_kills_in_order() -> float:
    """Neighbouring updates of a device that the chain folded in the device's order."""
    return campaign().in_order


@figure("device_kills.same_bytes", unit="%", bound="== 100", cls="long")
def device_kills_same_bytes() -> float:
    """Updates of the killed devices that are, by content id, those that an unkilled device makes."""
    return campaign().same_bytes


@figure("device_kills.lost_records", unit="1", bound=">= 1", cls="long")
def device_kills_lost_records() -> float:
    """Records that the broker had acknowledged, tier 1 consumed, and the broker lost when it was killed."""
    return campaign().lost_records


@figure("device_kills.sample", unit="%", bound="== 100", cls="full")
def device_kills_sample() -> float:
    """A campaign of 20 kills in small: updates exactly once, in order, or of the same bytes, the least of them."""
    found = campaign(kills=20)
    return min(found.exactly_once, found.in_order, found.same_bytes)

"""How far a newcomer's device is from its first accepted update."""

from __future__ import annotations

from benchmarks.first_update import first_updates
from benchmarks.registry import Reading, figure


@figure("first_update.commands", unit="1", bound="<= 3", cls="full")
def first_update_commands() -> float:
    """Commands from an empty directory and the installed wheel to the first update that tier 1 accepts."""
    return max(len(each.commands) for each in first_updates())


@figure("first_update.seconds", unit="s", cls="full")
def first_update_seconds() -> Reading:
    """Seconds that they run, until tier 1 has folded the update (20 steps on a model of 50,000 parameters)."""
    return Reading.of([each.seconds for each in first_updates()])


@figure("first_update.cold_start", unit="s", cls="full")
def first_update_cold_start() -> Reading:
    """From the start of `run-client` on a cold device to the end of its first training step."""
    return Reading.of([each.cold_start_s for each in first_updates()])

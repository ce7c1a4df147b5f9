"""Faults between devices and the gateway: what arrives, how often, and what has to be sent again. Item 7 of issue 4."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from benchmarks.faults import Outcome, run_faults
from benchmarks.registry import figure

FAULTS = 77


@cache
def campaign() -> Outcome:
    """Run the campaign once per process."""
    with tempfile.TemporaryDirectory() as directory:
        outcome = run_faults(Path(directory), faults=FAULTS)
    if outcome.n_faults < FAULTS:
        raise RuntimeError(f"{outcome.n_faults} faults of {FAULTS} were done")
    if not outcome.in_order:
        raise RuntimeError("a device's updates stand in the log in another order than that of their numbers")
    if outcome.partial_files:
        raise RuntimeError(f"{outcome.partial_files} partial files are left")
    return outcome


@figure("faults.exactly_once", unit="%", bound="== 100", cls="full")
def exactly_once() -> float:
    """Updates that the chain holds once, and the log in order, after 77 faults (cuts, kills, lost replies, outages)."""
    return campaign().exactly_once


@figure("faults.injected", unit="1", bound=">= 77", cls="full")
def injected() -> float:
    """Faults of that campaign, between two devices and the gateway, before a real broker that was killed twice."""
    return float(campaign().n_faults)


@figure("faults.resent_chunks", unit="1", bound="<= 1", cls="full")
def resent_chunks() -> float:
    """Chunks of a payload sent again after a fault, on the wire; the largest of the campaign."""
    return campaign().resent_chunks


@figure("faults.snapshot_resumed", unit="1", bound="<= 1", cls="full")
def snapshot_resumed() -> float:
    """Chunks of a snapshot fetched again after a fault, on the wire; the largest of the campaign."""
    return campaign().refetched_chunks

"""The campaign of kills in small: one round of every role, each piece of work killed twice."""

from __future__ import annotations

import re
import threading
import time

import pytest

from benchmarks import kills
from benchmarks.kills import ELSEWHERE, FAILPOINTS, run_campaign
from benchmarks.results import ROOT


def test_a_sigkill_in_any_role_loses_and_repeats_nothing(tmp_path):
    """After kills at failpoints and random times the chain has each sequence number once, and replay its digests."""
    found = run_campaign(tmp_path, kills=7, updates=15)
    print(found)
    assert len(found.kills) >= 7
    assert {kill.role for kill in found.kills} == set(FAILPOINTS)
    assert found.updates >= 15
    assert (found.exactly_once, found.replayed) == (100, 100)


def test_a_process_that_hangs_is_no_kill(tmp_path, monkeypatch):
    """A process that passed a failpoint and then stands still is an error, not a kill at what it was aimed at."""
    python, said = tmp_path / "python", tmp_path / "said"
    python.write_text(f"#!/bin/sh\necho outbox.after_row\ntouch '{said}'\nexec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr(kills.sys, "executable", str(python))
    monkeypatch.setattr(kills, "STUCK_S", 0.5)

    class Patient(threading.Timer):
        """Counts from the line on: half a second may be too short for a shell on a busy machine to begin."""

        def run(self) -> None:
            while not said.exists():
                time.sleep(0.01)
            super().run()

    monkeypatch.setattr(kills.threading, "Timer", Patient)
    driver = kills._Driver(tmp_path / "tier1.yaml", "nowhere:1", seed=0)
    with pytest.raises(RuntimeError, match="device hung for 0.5 s after .'outbox.after_row'"):
        driver.work("device", disturbed=True)
    assert not driver.campaign.kills


def test_every_failpoint_is_killed_at_here_or_in_a_test_that_is_named():
    """The campaign's list and what it leaves to other tests are all failpoints of device and tier 1, none twice."""
    sources = [path.read_text() for room in ("fednested_lib", "tier1") for path in (ROOT / room).rglob("*.py")]
    there = {name for source in sources for name in re.findall(r'failpoint\("([^"]+)"\)', source)}
    here = {name for names in FAILPOINTS.values() for name in names}
    assert len(there) > 20
    assert not here & set(ELSEWHERE)
    assert here | set(ELSEWHERE) == there
    assert not [name for name, why in ELSEWHERE.items() if name not in (ROOT / why.split(": ")[1]).read_text()]

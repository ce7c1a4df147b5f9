"""The campaign of kills in small: one round of every role, each piece of work killed twice."""

from __future__ import annotations

from benchmarks.kills import FAILPOINTS, run_campaign


def test_a_sigkill_in_any_role_loses_and_repeats_nothing(tmp_path):
    """After kills at failpoints and random times the chain has each sequence number once, and replay its digests."""
    found = run_campaign(tmp_path, kills=7, updates=15)
    print(found)
    assert len(found.kills) >= 7
    assert {kill.role for kill in found.kills} == set(FAILPOINTS)
    assert found.updates >= 15
    assert (found.exactly_once, found.replayed) == (100, 100)

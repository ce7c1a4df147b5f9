"""Few kills of trigger and connector; the figures `trigger.kills` and `sensor.kills` do fifty of each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.flyte.kills import describe, kill_connector, kill_trigger

SEED = int(os.environ.get("FEDNESTED_TEST_SEED", "20261122"))
KILLS = 6


@pytest.mark.slow
def test_a_killed_trigger_loses_no_task_and_doubles_no_execution(tmp_path: Path, kafka_bootstrap: str) -> None:
    """Six deaths at random and at failpoints, tasks sent twice, answers lost, plans busy: one execution per task."""
    found = kill_trigger(tmp_path, kafka_bootstrap, kills=KILLS, seed=SEED)
    print(f"seed {SEED}: {describe(found)}")
    assert (found.lost, found.doubled, found.not_buried) == ([], [], [])
    assert (found.kills, found.last_exit) == (KILLS, 0)


@pytest.mark.slow
def test_a_killed_connector_loses_no_cut(tmp_path: Path, kafka_bootstrap: str) -> None:
    """Six deaths between and during calls: the cuts tile the log, and each digest is that of its records."""
    found = kill_connector(tmp_path, kafka_bootstrap, kills=KILLS, seed=SEED)
    print(f"seed {SEED}: {describe(found)}")
    assert (found.gaps, found.wrong_digests) == ([], 0)
    assert found.kills == KILLS
    assert sum(cut.n_records for cut in found.cuts) == found.records > 0

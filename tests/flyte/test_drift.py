"""One planted drift, unattended; the figure `data_engine.drift_to_candidate` plants five. And what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flyte import drift
from tests.flyte.admin_stand_in import AdminStandIn
from tests.flyte.drift import drift_to_candidate


@pytest.mark.slow
def test_a_planted_drift_becomes_one_candidate_unattended(tmp_path: Path, kafka_bootstrap: str) -> None:
    """Telemetry on a real broker → data engine → trigger → a round in a process of its own → one candidate."""
    found = drift_to_candidate(tmp_path, kafka_bootstrap, seed=1)
    assert (found.tasks, len(found.admitted), found.candidates, found.waiting) == (["north"], 1, 1, 1)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen]]:
    """Every process that is started, with next to no patience; none outlives the test."""
    processes: list[subprocess.Popen] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(drift, "PATIENCE_S", 0.2)
    monkeypatch.setattr(drift, "GRACE_S", 0.2)
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_a_turn_that_takes_too_long_is_not_left_running(tmp_path: Path, started: list[subprocess.Popen]) -> None:
    """On a slow machine the error is the time-out, and pyflyte is gone."""
    with pytest.raises(subprocess.TimeoutExpired):
        drift._turn(tmp_path / "tier1.yaml")
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_trigger_that_does_not_end_is_killed_and_hides_no_error(
    tmp_path: Path, started: list[subprocess.Popen]
) -> None:
    """A trigger that SIGTERM does not reach is killed; what failed inside is what one sees."""

    def fail_inside(admin: AdminStandIn) -> None:
        with drift._trigger(tmp_path / "tier1.yaml", admin):
            started[0].send_signal(signal.SIGSTOP)
            os.waitpid(started[0].pid, os.WUNTRACED)  # it has stopped
            raise RuntimeError("inside")

    with AdminStandIn() as admin, pytest.raises(RuntimeError, match="inside"):
        fail_inside(admin)
    assert [process.returncode for process in started] == [-signal.SIGKILL]

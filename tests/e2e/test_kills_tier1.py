from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.embedded import EmbeddedBroker
from tests.e2e.tier1_process import CORE_FAILPOINTS, FAILPOINTS

ROOT = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("FEDNESTED_TEST_SEED", "20261122"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every scenario, run once: real processes, a real broker, SIGKILL."""
    directory = tmp_path_factory.mktemp("kills")
    with EmbeddedBroker(directory / "broker") as broker:
        done = subprocess.run(
            [sys.executable, "-m", "tests.e2e.tier1_process", str(directory), broker.bootstrap, str(SEED)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"seed {SEED}")
    return json.loads(done.stdout.splitlines()[-1])


KEPT = ("head", "champion", "weights", "versions", "offsets", "registry")


@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_coordinator_killed_between_two_durable_steps_loses_nothing(results, name):
    """Killed at this point and run again, the round ends with the same weights, each sequence number exactly once."""
    found = results["failpoints"][name]
    assert found["killed"] == -9
    assert found["recovered"][-1] == 0
    assert {key: found[key] for key in KEPT} == {key: results["reference"][key] for key in KEPT}
    sequences = [(client, sequence) for client, sequence, _ in found["weights"]]
    assert len(sequences) == len(set(sequences)) == 4


def test_a_coordinator_killed_at_random_times_loses_nothing(results):
    """Eight kills at random times: same weights, same offsets, each sequence number exactly once."""
    for found in results["random"]:
        assert found["recovered"][-1] == 0, found
        assert {key: found[key] for key in KEPT} == {key: results["reference"][key] for key in KEPT}
    assert any(found["killed"] == -9 for found in results["random"])


@pytest.mark.parametrize("name", CORE_FAILPOINTS)
def test_a_core_update_killed_anywhere_folds_its_delta_once(results, name):
    """Restarted under its own name, the run makes one version with the weights of an uninterrupted run."""
    found = results["core"][name]
    assert (found["killed"], found["recovered"][-1], found["versions"]) == (-9, 0, 2)
    assert found["champion"] == results["core_outcome"]["champion"]


def test_of_two_committers_at_once_one_wins_and_the_other_folds_again(results):
    """A core update and a device fold race for version 2: both get in, the loser on the winner's head, recorded."""
    race = results["race"]
    assert race["codes"] == [0, 0]
    assert race["versions"] == 4
    assert sorted(race["tries"], key=len) == [["passed"], ["lost_race", "passed"]]

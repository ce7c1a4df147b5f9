"""SIGKILL between every two durable steps, and at random times; a second run must make it good."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fednested_lib.blobs import BlobStore
from fednested_lib.log import QUARANTINE
from tests.tier1.versions.scene import Scene
from tests.tier1.versions.story import tell
from tier1.versions.replay import replay, verify_archive, verify_blobs, verify_log

ROOT = Path(__file__).parents[3]
FAILPOINTS = [
    "fold.after_archive",
    "fold.after_blobs:2",
    "fold.after_candidate:3",
    "durable.before_rename:50",
    "commit.before_append:2",
    "commit.before_append:4",
    "commit.after_append:1",
    "commit.after_append:3",
    "quarantine.after_publish:2",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Scene:
    """The story told without interruption."""
    return tell(tmp_path_factory.mktemp("whole"))


def start(home: Path, failpoint: str = "") -> subprocess.Popen:
    environment = {**os.environ, "FEDNESTED_FAILPOINT": failpoint, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.tier1.versions.story", str(home)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def digests(scene: Scene) -> list[str]:
    return [sealed.digest for sealed in scene.chain.entries()]


def quarantined(scene: Scene) -> set[bytes]:
    return {record.key for record in scene.log.read(QUARANTINE, scene.log.watermarks(QUARANTINE))}


def assert_made_good(home: Path, whole: Scene) -> None:
    """Tell the story again after a crash and compare with the uninterrupted one."""
    scene = tell(home)
    assert len(quarantined(scene)) == 3
    assert digests(scene) == digests(whole)  # same log and cuts, same digests: blobs, weights, tries, refusals
    bodies = [sealed.entry.body for sealed in scene.chain.entries() if sealed.entry.body.kind == "version"]
    accepted = [(u.client_id, u.sequence) for body in bodies for u in body.candidate.accepted]
    assert sorted(accepted) == sorted({(client, sequence) for client in scene.clients for sequence in (0, 1)})
    assert verify_blobs(scene.chain.state(), scene.blobs) == []
    assert verify_archive(scene.chain, scene.archive) == 8 + 3
    assert {check.status for check in verify_log(scene.chain, scene.log)} == {"same"}


def test_story_is_what_it_says(whole, tmp_path):
    """Three versions: a cut, a cut whose gate failed once, a core update that lost its race; all replay identically."""
    bodies = [sealed.entry.body for sealed in whole.chain.entries()[1:]]
    assert [[one.outcome for one in body.tries] for body in bodies] == [
        ["passed"],
        ["gate_failed", "passed"],
        ["lost_race", "passed"],
    ]
    refused = sorted(record.reason for body in bodies for record in body.candidate.refused)
    assert refused == ["duplicate", "equivocation", "unknown_client"]
    target = BlobStore(tmp_path)
    results = replay(whole.chain, archive=whole.archive, genesis=whole.blobs, target=target, devices=whole.devices)
    assert {result.verdict for result in results} == {"identical"}


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_kill_at_a_failpoint_changes_nothing(whole, tmp_path, failpoint):
    """A process that dies at the failpoint and one that starts after it leave the same chain, to the digest."""
    process = start(tmp_path, failpoint)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == -signal.SIGKILL, output[-2000:]
    assert_made_good(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kill_at_a_random_time_changes_nothing(whole, tmp_path, seed):
    """A process killed at a random time (seed printed) is made good by the next one."""
    process = start(tmp_path)
    while process.stdout.readline() not in (b"ready\n", b""):
        pass
    delay = random.Random(seed).uniform(0, 0.6)
    print(f"seed {seed}: killed {delay:.3f} s after it was ready")
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=120)
    assert_made_good(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_at_once_share_one_chain(whole, tmp_path):
    """Two processes that tell the same story in the same home: every entry is written once and nothing is lost."""
    processes = [start(tmp_path), start(tmp_path)]
    outputs = [process.communicate(timeout=120)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output[-2000:] for output in outputs)
    assert_made_good(tmp_path, whole)

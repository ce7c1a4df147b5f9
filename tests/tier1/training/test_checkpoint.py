"""Checkpoints: exact resume, two kept, and what is torn or of another run refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from fednested_lib.errors import StorageError, TrainingError
from tier1.training.checkpoint import SLOTS, Checkpoints, Progress
from tier1.training.model import initial_model
from tier1.training.settings import TrainSettings
from tier1.training.trainer import train

ROWS = np.random.default_rng(0).integers(0, 20, size=(24, 17)).astype(np.int32)
RANDOM = {"attention_dropout": 0.2, "router_jitter_noise": 0.05}
SETTINGS = TrainSettings(steps=10, batch_size=5, learning_rate=1e-2)
STATE = {"model.a": torch.arange(6.0).reshape(2, 3), "optimizer.step.a": torch.tensor(3.0)}


class Stop(Exception):
    """Ends a run between two steps."""


def trained(config, checkpoints=None, stop_after=None, family="mixtral"):
    model = initial_model(family, config, 0)

    def on_step(step, loss):
        if step == stop_after:
            raise Stop

    report = train(model, ROWS, SETTINGS, family=family, checkpoints=checkpoints, on_step=on_step)
    return model.state_dict(), report


@pytest.fixture
def place(tmp_path):
    def of(run=None, every=3):
        return Checkpoints(directory=tmp_path / "run", every=every, run=run or {"base_digest": "b", "seed": 0})

    return of


def save(checkpoints, step):
    checkpoints.save(Progress(step=step, loss_first=2.0, loss_last=1.0 / 3), STATE)


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_run_ends_with_the_bits_of_a_whole_one(small_mixtral, place, tied):
    """Guards weights, moments, row order across an epoch's end, dropout, router noise, tied weights and the report."""
    config = small_mixtral | RANDOM | {"tie_word_embeddings": tied}
    whole, report = trained(config)
    with pytest.raises(Stop):
        trained(config, place(), stop_after=8)
    torch.manual_seed(99)  # the random numbers of a step are nobody else's
    resumed, report_resumed = trained(config, place())
    assert place().newest().progress.step == 9
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert report == report_resumed


def test_a_run_leaves_the_callers_random_numbers_alone(small_mixtral):
    """Guards that seeding every step does not move the generator of whoever calls."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trained(small_mixtral | RANDOM)
    assert torch.equal(before, torch.get_rng_state())


def test_the_two_newest_are_kept_and_the_newest_is_found(place):
    """Guards the turn of the two files: the older one is overwritten, however often."""
    for step in (3, 6, 9, 12):
        save(place(), step)
    assert {path.name for path in place().directory.iterdir()} == set(SLOTS)
    found = place().newest()
    assert found.progress == Progress(step=12, loss_first=2.0, loss_last=1.0 / 3)
    assert all(torch.equal(STATE[name], found.state[name]) for name in STATE)
    (place().directory / found.name).unlink()
    assert place().newest().progress.step == 9


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [flip, cut, empty])
def test_a_torn_checkpoint_is_refused_by_name_and_the_one_before_is_used(place, spoil):
    """Guards bit rot, a lost tail and an empty file: never loaded, always told, never fatal."""
    save(place(), 3)
    save(place(), 6)
    spoil(place().directory / SLOTS[1])
    with capture_logs() as events:
        assert place().newest().progress.step == 3
    (refused,) = {event["file"]: event for event in events if event["event"] == "checkpoint.refused"}.values()
    assert refused["file"] == SLOTS[1]
    assert "torn" in refused["reason"]
    save(place(), 6)
    assert place().newest().progress.step == 6


def test_only_torn_checkpoints_mean_a_new_beginning(place):
    """Guards that a copy that was cut short on its way does not stop a run for ever."""
    save(place(), 3)
    cut(place().directory / SLOTS[0])
    assert place().newest() is None


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(place):
    """Guards against going on from another model, data or rate: named if nothing else is there, else passed over."""
    save(place({"base_digest": "b", "seed": 0}), 3)
    save(place({"base_digest": "other", "seed": 0}), 6)
    assert place().newest().progress.step == 3
    with pytest.raises(
        TrainingError, match=rf"{SLOTS[1]} is of another run: its base_digest is other, this run's is b; train"
    ):
        place({"base_digest": "b", "seed": 7}).newest()
    assert {path.name for path in place().directory.iterdir()} == set(SLOTS), "a refusal deletes nothing"
    save(place(), 6)
    (place().directory / SLOTS[1]).unlink()
    assert place().newest().progress.step == 3, "the other run's goes first"


@pytest.mark.parametrize("lost", ["everything", "format", "progress", "run", "tensors"])
def test_another_safetensors_file_is_no_checkpoint(place, lost):
    """Guards against a weights file under a checkpoint's name, and a header that lacks a part: no traceback."""
    from safetensors.torch import save_file

    header = {"format": 1, "progress": {"step": 3}, "run": {}, "tensors": "0"}
    header.pop(lost, None)
    place().directory.mkdir()
    metadata = None if lost == "everything" else {"fednested": json.dumps(header)}
    save_file(STATE, place().directory / SLOTS[0], metadata=metadata)
    assert place().newest() is None
    save(place(), 3)
    assert place().newest().progress.step == 3


def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(place):
    """Guards a write that ends halfway: nothing half written is left, and the message names the step that is safe."""
    save(place(), 3)
    save(place(), 6)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(
            StorageError, match=r"checkpoint of step 9 to .*: free space .*; the checkpoint of step 6 is"
        ):
            save(place(), 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name for path in place().directory.iterdir()} == set(SLOTS)
    assert place().newest().progress.step == 6


def test_a_kill_before_the_rename_leaves_the_newest_and_its_rest_is_swept(place, tmp_path):
    """Guards the order write, sync, rename: a power cut in between costs the new checkpoint alone."""
    save(place(), 3)
    save(place(), 6)
    program = (
        "from tests.tier1.training.test_checkpoint import *; from pathlib import Path; import sys;"
        "save(Checkpoints(directory=Path(sys.argv[1]), every=3, run={'base_digest': 'b', 'seed': 0}), 9)"
    )
    environment = {**os.environ, "FEDNESTED_FAILPOINT": "checkpoint.before_rename"}
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", program, str(place().directory)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(list(place().directory.iterdir())) == 3
    assert place().newest().progress.step == 6
    save(place(), 9)
    assert {path.name for path in place().directory.iterdir()} == set(SLOTS)


def test_nan_keeps_the_last_good_checkpoint(small_mixtral, place):
    """Guards that a run that fails at step 8 can be started again, with another rate, from nothing it spoilt."""
    with pytest.raises(Stop):
        trained(small_mixtral, place(), stop_after=7)
    model = initial_model("mixtral", small_mixtral, 0)
    model.model.norm.register_forward_hook(lambda module, args, output: output * float("nan"))
    with pytest.raises(
        TrainingError, match=r"at step 7 of 10 .*\(rows \d+, \d+, .* another run name; .* of step 6 is in"
    ):
        train(model, ROWS, SETTINGS, family="mixtral", checkpoints=place())
    found = place().newest()
    assert found.progress.step == 6
    assert all(torch.isfinite(tensor).all() for tensor in found.state.values())


class Elsewhere:
    """A mirror in another directory."""

    def __init__(self, directory):
        self.directory = directory

    def restore(self, directory):
        for path in self.directory.iterdir():
            shutil.copy(path, directory)

    def save(self, path):
        self.directory.mkdir(exist_ok=True)
        shutil.copy(path, self.directory)


def test_what_is_torn_here_is_fetched_from_the_mirror(place, tmp_path):
    """A readable header over a damaged body is no checkpoint: the second place is asked before a run begins anew."""
    checkpoints = dataclasses.replace(place(), mirror=Elsewhere(tmp_path / "mirror"))
    save(checkpoints, 3)
    (path,) = (checkpoints.directory / name for name in SLOTS if (checkpoints.directory / name).exists())
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert checkpoints.newest().progress.step == 3
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    shutil.rmtree(tmp_path / "mirror")
    (tmp_path / "mirror").mkdir()
    assert checkpoints.newest() is None

"""The learning rate over a run: corners of every kind, today's default to the bit, refused values, resumption."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from fednested_lib.errors import ConfigError, TrainingError
from tests.federation import make_workspace
from tier1.config import load_tier1
from tier1.training.backends import TorchBackend
from tier1.training.checkpoint import Checkpoints
from tier1.training.model import initial_model
from tier1.training.schedule import Schedule
from tier1.training.settings import TrainSettings
from tier1.training.trainer import train

ROWS = np.random.default_rng(0).integers(0, 20, size=(24, 17)).astype(np.int32)


def factors(steps=100, **changes):
    shape = Schedule(**{"warmup": 0.1, **changes})
    return [shape.factor(step, steps) for step in range(1, steps + 1)]


def test_the_default_is_a_cosine_down_to_a_tenth():
    """Guards that configurations without a schedule train as they did, to the bit."""
    for steps in (1, 2, 7, 300):
        rising = max(1, round(0.05 * steps))
        for step in range(rising + 1, steps + 1):
            over = min(1.0, (step - rising) / max(1, steps - rising))
            assert Schedule().factor(step, steps) == 0.1 + (1 - 0.1) * 0.5 * (1 + math.cos(math.pi * over))
        assert [Schedule().factor(s, steps) for s in range(1, rising + 1)] == [s / rising for s in range(1, rising + 1)]


@pytest.mark.parametrize(
    ("changes", "half", "end"),
    [
        ({"kind": "constant"}, 1.0, 1.0),
        ({"kind": "linear", "final": 0.2}, 0.6, 0.2),
        ({"kind": "cosine", "final": 0.2}, 0.6, 0.2),
        ({"kind": "wsd", "final": 0.2}, 1.0, 0.2),
    ],
)
def test_every_kind_has_its_corners(changes, half, end):
    """Guards warm-up, middle (step 55 of 10..100), end and what is beyond it; no rate is above the peak."""
    found = factors(**changes)
    assert found[:10] == [step / 10 for step in range(1, 11)]
    assert (found[54], found[99]) == (pytest.approx(half), pytest.approx(end))
    assert max(found) == 1.0
    assert Schedule(warmup=0.1, **changes).factor(1000, 100) == found[99]
    assert all(a >= b for a, b in zip(found[9:], found[10:], strict=False))


def test_wsd_falls_in_its_last_share_alone():
    """Guards that warm-up, stable and decay are where the shares say: 10, then 65, then 25 steps."""
    found = factors(kind="wsd", decay=0.25, final=0.0)
    assert found[9:75] == [1.0] * 66
    assert found[75:] == pytest.approx([1 - n / 25 for n in range(1, 26)])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_the_shortest_runs_have_a_rate(kind):
    """Guards runs of a step or two, where shares round to nothing: the rate is above 0 and at most the peak."""
    for steps in (1, 2, 3):
        for warmup in (0.0, 0.5, 0.9):
            shape = Schedule(kind=kind, warmup=warmup, decay=0.1)
            assert all(0 < shape.factor(step, steps) <= 1 for step in range(1, steps + 2))


@pytest.mark.parametrize(
    ("schedule", "line"),
    [
        ({"kind": "triangle"}, r"core\.schedule\.kind"),
        ({"warmup": 1.5}, r"core\.schedule\.warmup"),
        ({"final": -0.1}, r"core\.schedule\.final"),
        ({"kind": "wsd", "decay": 0.0}, r"core\.schedule\.decay"),
        ({"kind": "wsd", "warmup": 0.6, "decay": 0.5}, r"warmup \+ decay must be at most 1, got 1\.1: lower"),
        ({"kind": "linear", "decay": 0.5}, r"decay is of kind wsd alone, got it with linear: leave it out"),
        ({"kind": "constant", "final": 0.5}, r"final must be left out with kind constant"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_when_the_file_is_read(tmp_path, schedule, line):
    """Guards that a wrong schedule is one line before any training."""
    with pytest.raises(ConfigError, match=line) as caught:
        load_tier1(make_workspace(tmp_path, core={"schedule": schedule}))
    assert "\n" not in str(caught.value)


class Recorded(TorchBackend):
    """Plain torch that writes down the rates it is given, and stops after some steps."""

    def __init__(self, rates, last=None):
        super().__init__()
        self.rates, self.last = rates, last

    def step(self, rows, rate):
        if self.last is not None and len(self.rates) >= self.last:
            raise KeyboardInterrupt
        self.rates.append(rate)
        return super().step(rows, rate)


def test_a_resumed_run_has_the_rates_and_bits_of_a_whole_one(small_mixtral, tmp_path):
    """Guards that the rate follows from the step, in the middle of the decay too; another schedule's run is refused."""
    settings = TrainSettings(steps=10, batch_size=4, schedule=Schedule(kind="wsd", decay=0.5))
    run = {"settings.schedule": asdict(settings.schedule)}  # as `train_core_update` says it

    def trained(backend, checkpoints=None):
        model = initial_model("mixtral", small_mixtral, 0)
        train(model, ROWS, settings, family="mixtral", backend=backend, checkpoints=checkpoints)
        return model.state_dict()

    whole, before, after = [], [], []
    expected = trained(Recorded(whole))
    place = Checkpoints(directory=tmp_path / "run", every=7, run=run)
    with pytest.raises(KeyboardInterrupt):
        trained(Recorded(before, last=8), place)
    resumed = trained(Recorded(after), place)
    assert before[:7] + after == whole == [settings.factor(step) for step in range(1, 11)]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    with pytest.raises(TrainingError, match=r"its settings\.schedule is .*wsd"):
        Checkpoints(directory=tmp_path / "run", every=7, run={"settings.schedule": asdict(Schedule())}).newest()

"""Safeguards on several ranks and engines: what one process of plain torch computes; the same bits after a kill."""

from __future__ import annotations

import importlib.util
import signal

import pytest

from fednested_lib.errors import ConfigError
from tests.tier1.training.rank_process import MODEL, STILL, RankRunner
from tier1.training.deepspeed_backend import DeepSpeedBackend
from tier1.training.deepspeed_config import DeepSpeedSettings
from tier1.training.model import initial_model
from tier1.training.safeguarded import safeguarded
from tier1.training.safeguards import Memory, Rehearsed, Safeguards
from tier1.training.settings import TrainSettings

INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed: see docs/training.md")
# The clip is so small that it acts; the balancing loss would depend on the number of passes.
RUN = {"steps": 10, "still": True, "clip": 0.3, "aux_loss": 0.0}
EVERY = ["replay", "distillation", "ewc", "freeze", "frequencies"]
WITHOUT_REHEARSAL = EVERY[2:]
EXPERTS = {"zero_stage": 2, "expert_parallel": 2}


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with RankRunner(tmp_path_factory.mktemp("ranks"), *(["deepspeed"] if INSTALLED else [])) as runner:
        yield runner


@pytest.fixture(scope="module")
def one_process(runner):
    """Losses of one process with plain torch, by safeguards."""
    return {tuple(names): done(runner.run(1, safeguards=names, **RUN))[0].losses for names in (EVERY, EVERY[2:])}


def done(ended):
    assert all(one.status == 0 for one in ended), ended
    return ended


def apart(losses, reference):
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


@pytest.mark.parametrize(
    ("engine", "names", "micro_batch"),
    [
        (None, EVERY, None),
        pytest.param(EXPERTS, EVERY, None, marks=needs_deepspeed),
        pytest.param({"zero_stage": 3, "expert_parallel": 2}, WITHOUT_REHEARSAL, 2, marks=needs_deepspeed),
    ],
    ids=str,
)
def test_safeguards_on_two_ranks_have_the_curve_of_one_process(runner, one_process, engine, names, micro_batch):
    """Guards drawn rows, springs and resting experts: on any layout they are those of the whole batch and model."""
    first, second = done(runner.run(2, engine=engine, safeguards=names, micro_batch=micro_batch, **RUN))
    assert first.losses == second.losses
    assert first.weights == second.weights
    assert apart(first.losses, one_process[tuple(names)]) <= 1e-5


def test_a_killed_rank_and_the_safeguarded_run_goes_on_to_the_same_bits(runner, tmp_path):
    """Guards exact resume on two ranks: rows drawn for all, and what slow groups had collected."""
    run = {"router_noise": False, "safeguards": EVERY, "steps": 10}
    whole = done(runner.run(2, **run))[0].weights
    ended = runner.run(2, directory=str(tmp_path), kill={1: "core.after_step:7"}, **run)
    assert (ended[1].status, ended[0].error) == (-signal.SIGKILL, "TransportError"), ended
    resumed = done(runner.run(2, directory=str(tmp_path), **run))
    assert [one.weights for one in resumed] == [whole, whole]
    assert len(resumed[0].losses) == 6, "it went on from step 4"


@needs_deepspeed
def test_a_safeguarded_run_goes_on_with_another_layout(runner, one_process, tmp_path):
    """Guards that what slow groups collected is of no layout: cut experts on two ranks, then plain torch on one."""
    run = {"directory": str(tmp_path), "safeguards": EVERY, **RUN}
    runner.run(2, engine=EXPERTS, kill={0: "core.after_step:5"}, **run)
    (rest,) = done(runner.run(1, **run))
    assert len(rest.losses) == 6, "it went on from step 4"
    assert apart(rest.losses, one_process[tuple(EVERY)][-6:]) <= 1e-5


@pytest.mark.parametrize("name", ["replay", "distillation"])
def test_what_zero_3_cannot_is_refused_by_name(name):
    """Guards the message: which safeguard with which stage, and what to set."""
    backend = safeguarded(
        Safeguards(**{name: Rehearsed()}), Memory(), DeepSpeedBackend(DeepSpeedSettings(zero_stage=3))
    )
    model = initial_model("mixtral", MODEL | STILL, 0)
    with pytest.raises(ConfigError, match=rf"core\.safeguards\.{name} must be off with .*zero_stage 3: set zero_stage"):
        backend.prepare(model, TrainSettings(steps=1), "mixtral")

"""DeepSpeed computes what plain torch does, whoever holds what, and a killed run ends with the same bits."""

from __future__ import annotations

import importlib.util
import signal
import sys

import pytest

from fednested_lib.errors import ConfigError
from tests.tier1.training.rank_process import MODEL, STILL, RankRunner
from tier1.training.checkpoint import Checkpoints, Progress
from tier1.training.deepspeed_backend import DeepSpeedBackend
from tier1.training.deepspeed_config import DeepSpeedSettings, check_layout
from tier1.training.model import initial_model
from tier1.training.ranks import Ranks
from tier1.training.settings import TrainSettings

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: see docs/training.md"
)
STAGES = ({"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3})
EXPERTS = ({"zero_stage": 2, "expert_parallel": 2}, {"zero_stage": 3, "expert_parallel": 2})
# So small that the clip acts on every step: it acts alike only if the norm is the global one.
RUN = {"steps": 12, "still": True, "aux_loss": 1.0, "clip": 0.3}
# Rates and decay that no engine has by itself: each group must have its own, also where experts are cut.
RUN |= {"expert_rate": 3e-2, "router_rate": 1e-3, "decay": 1.0}


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    installed = ["deepspeed"] if importlib.util.find_spec("deepspeed") else []
    with RankRunner(tmp_path_factory.mktemp("ranks"), *installed) as runner:
        yield runner


@pytest.fixture(scope="module")
def torch_losses(runner):
    """Losses of one process with plain torch."""
    return done(runner.run(1, **RUN))[0].losses


def done(ended):
    assert all(one.status == 0 for one in ended), ended
    return ended


def apart(losses, reference):
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


@needs_deepspeed
@pytest.mark.parametrize("engine", [*STAGES, *EXPERTS], ids=str)
def test_every_engine_has_the_curve_of_one_process(runner, torch_losses, engine):
    """Guards item 1 of issue 6: clip, rates, decay and balancing loss are one process's on any layout."""
    first, second = done(runner.run(2, engine=engine, **RUN))
    assert first.losses == second.losses
    assert first.weights == second.weights, "gathered weights are the same on every rank"
    assert apart(first.losses, torch_losses) <= 1e-4


@needs_deepspeed
@pytest.mark.parametrize("engine", [STAGES[2], EXPERTS[0]], ids=str)
def test_a_killed_rank_and_the_run_goes_on_to_the_same_bits(runner, tmp_path, engine):
    """Guards item 2: the gathered state is all that the next step depends on, for cut weights and cut experts."""
    run = {"engine": engine, "router_noise": False}  # dropout stays: random numbers count
    whole = done(runner.run(2, **run))[0].weights
    ended = runner.run(2, directory=str(tmp_path), kill={1: "core.after_step:6"}, **run)
    assert ended[1].status == -signal.SIGKILL
    assert (ended[0].status, ended[0].error) == (1, "TransportError"), ended[0]
    resumed = done(runner.run(2, directory=str(tmp_path), **run))
    assert [one.weights for one in resumed] == [whole, whole]
    assert len(resumed[0].losses) == 8, "it went on from step 4"


@needs_deepspeed
def test_a_run_goes_on_with_another_layout(runner, torch_losses, tmp_path):
    """Guards that a checkpoint is of no layout: cut experts on two ranks, then ZeRO-3 on one, then plain torch."""
    layouts = [(2, EXPERTS[0], "core.after_step:5"), (1, STAGES[2], "core.after_step:9"), (1, None, None)]
    losses = []
    for world_size, engine, at in layouts:
        kill = {0: at} if at else {}
        ended = runner.run(world_size, engine=engine, directory=str(tmp_path), kill=kill, **RUN)
        losses.append(ended[0].losses)
    assert len(losses[-1]) == 4, "it went on from step 8"
    assert apart(losses[-1], torch_losses[-4:]) <= 1e-4


@needs_deepspeed
def test_weights_without_moments_are_a_beginning(runner, tmp_path):
    """Guards a state in which no parameter has moved yet: plain torch takes it, and so does DeepSpeed."""
    weights = initial_model("mixtral", MODEL | STILL, 0).state_dict()
    state = {f"model.{name}": tensor for name, tensor in weights.items()}
    losses = []
    for engine in (None, STAGES[1]):
        place = Checkpoints(directory=tmp_path / str(engine), every=99, run={"steps": 12})
        place.save(Progress(step=8, loss_first=5.0, loss_last=5.0), state)
        (one,) = done(runner.run(1, engine=engine, directory=str(place.directory), every=99, **RUN))
        losses.append(one.losses)
    assert len(losses[0]) == 4
    assert apart(losses[1], losses[0]) <= 1e-4


@needs_deepspeed
@pytest.mark.parametrize("engine", [STAGES[1], STAGES[2], EXPERTS[0]], ids=str)
def test_bf16_does_not_round_what_training_starts_from(runner, engine):
    """Guards the delta: DeepSpeed makes its fp32 weights of the bf16 ones, and their rounding would be folded."""
    run = {"steps": 2, "still": True, "rate": 0.0}
    (base,) = done(runner.run(1, **run))
    assert {one.weights for one in done(runner.run(2, engine=engine | {"bf16": True}, **run))} == {base.weights}


@needs_deepspeed
def test_a_nan_stops_all_ranks_of_an_engine(runner, tmp_path):
    """Guards that DeepSpeed's own skipping of bad steps is an error here, of all ranks, as with plain torch."""
    ended = runner.run(2, directory=str(tmp_path), engine=EXPERTS[0], still=True, poisoned_rank=1)
    assert {one.error for one in ended} == {"TrainingError"}, ended
    assert "step 6 of 12 is not finite (rows " in ended[0].message


def test_micro_batches_and_recomputed_activations_change_nothing(runner, torch_losses):
    """Guards both ways to save memory: the loss curve is that of the whole batch without the balancing loss."""
    run = RUN | {"aux_loss": 0.0}
    (whole,) = done(runner.run(1, **run))
    (small,) = done(runner.run(1, micro_batch=2, recompute=True, **run))
    assert whole.losses != torch_losses
    assert apart(small.losses, whole.losses) <= 1e-5


class Shape:
    """A transformers configuration, as far as the layout reads it."""

    num_local_experts = MODEL["num_local_experts"]
    router_jitter_noise = 0.0


def test_without_deepspeed_the_error_names_the_key(monkeypatch):
    """Guards the message on a machine or in an image that does not have the package: one line, before any training."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    model = initial_model("mixtral", MODEL | {"router_jitter_noise": 0.0}, 0)
    with pytest.raises(ConfigError, match=r"core\.deepspeed needs the package deepspeed"):
        DeepSpeedBackend().prepare(model, TrainSettings(steps=1), "mixtral")


def test_experts_that_do_not_divide_name_what_does():
    """Guards the message of a world size that does not divide the experts, or the ranks."""
    three = DeepSpeedSettings(expert_parallel=3)
    with pytest.raises(ConfigError, match=r"divide the 6 rank\(s\) and the 4 experts, got 3: set it to 1 or 2"):
        check_layout(three, "mixtral", Shape(), Ranks(world_size=6))
    check_layout(DeepSpeedSettings(expert_parallel=2), "mixtral", Shape(), Ranks(world_size=6))


def test_what_autoep_would_compute_differently_is_refused():
    """Guards against a silent change of the function: a router with noise, a family whose router it does not know."""
    noisy = Shape()
    noisy.router_jitter_noise = 0.01
    two = DeepSpeedSettings(expert_parallel=2)
    for layout in (two, DeepSpeedSettings(zero_stage=3)):
        with pytest.raises(ConfigError, match=r"router_jitter_noise must be 0 .* got 0\.01"):
            check_layout(layout, "mixtral", noisy, Ranks(world_size=2))
    with pytest.raises(ConfigError, match="must be 1 for family olmoe, got 2: mixtral, qwen3_moe have more"):
        check_layout(two, "olmoe", Shape(), Ranks(world_size=2))


def test_a_micro_batch_that_does_not_divide_names_the_sizes_that_do():
    """Guards the message of a micro-batch that leaves a rest."""
    with pytest.raises(ConfigError, match=r"divide the 6 rows that each of 2 rank\(s\) .* got 4: set it to 3 or 6"):
        TrainSettings(steps=1, batch_size=12, micro_batch=4).rows_per_pass(2)
    assert TrainSettings(steps=1, batch_size=12, micro_batch=50).passes(2) == 1

"""Several ranks: the same curve as one, the same bits after a kill, and one clear end when one of them dies."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from fednested_lib.errors import ConfigError
from tests.tier1.training.rank_process import RankRunner
from tier1.training.ranks import ALONE, Ranks, join_ranks


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with RankRunner(tmp_path_factory.mktemp("ranks")) as runner:
        yield runner


@pytest.fixture(scope="module")
def whole(runner):
    """Weights of two ranks that nobody interrupted."""
    first, second = runner.run(2)
    assert first.status == second.status == 0, (first, second)
    assert first.weights == second.weights, "ranks must hold the same weights to the bit"
    return first.weights


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_two_ranks_have_the_curve_of_one(runner):
    """Guards the global batch: gradient, clip and balancing loss are those of all rows, so the curves agree.

    With the balancing loss of each rank's own rows they would differ by 0.8 % at this coefficient, and by 0.02 % at the
    usual one.
    """
    (one,) = runner.run(1, steps=50, still=True, aux_loss=1.0)
    first, second = runner.run(2, steps=50, still=True, aux_loss=1.0)
    assert first.losses == second.losses
    assert max(abs(a - b) / a for a, b in zip(one.losses, first.losses, strict=True)) <= 1e-3
    assert one.losses[-1] < one.losses[0] - 0.5


@pytest.mark.parametrize(
    ("rank", "at"), [(0, "core.after_step:6"), (1, "core.after_step:9"), (0, "checkpoint.before_rename:2")]
)
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(runner, whole, tmp_path, rank, at):
    """Guards item 2 of issue 6: SIGKILL of either rank ends the other with one line; the resumed bits are the same."""
    ended = runner.run(2, directory=str(tmp_path), kill={rank: at})
    assert ended[rank].status == -signal.SIGKILL
    other = ended[1 - rank]
    assert (other.status, other.error) == (1, "TransportError"), other
    assert "lost another rank" in other.message
    assert "run again under the same name" in other.message
    resumed = runner.run(2, directory=str(tmp_path))
    assert [one.weights for one in resumed] == [whole, whole]
    assert len(resumed[0].losses) < 12, "it began anew"
    assert files(tmp_path) == {"checkpoint-0.safetensors", "checkpoint-1.safetensors"}


def test_a_run_goes_on_with_another_number_of_ranks(runner, tmp_path):
    """Guards that a checkpoint is not tied to its layout: what two ranks began, one ends near the same loss."""
    runner.run(2, directory=str(tmp_path), still=True, kill={0: "core.after_step:10"})
    (resumed,) = runner.run(1, directory=str(tmp_path), still=True)
    (alone,) = runner.run(1, still=True)
    assert len(resumed.losses) == 4
    assert resumed.losses[-1] == pytest.approx(alone.losses[-1], rel=1e-3)


def test_a_nan_on_one_rank_stops_all(runner, tmp_path):
    """Guards that ranks judge the global loss: all stop at the step, name its rows, and the checkpoint before stays."""
    ended = runner.run(2, directory=str(tmp_path), poisoned_rank=1)
    assert {one.error for one in ended} == {"TrainingError"}
    assert ended[0].message == ended[1].message
    assert "step 6 of 12 is not finite (rows " in ended[0].message
    assert files(tmp_path) == {"checkpoint-0.safetensors"}


def test_a_full_disk_is_every_ranks_error(runner, whole, tmp_path):
    """Guards that the rank that writes tells the others why it ends: nobody reports a lost rank."""
    ended = runner.run(2, directory=str(tmp_path), file_limit=100_000)
    assert {one.error for one in ended} == {"StorageError"}, ended
    assert ended[0].message == ended[1].message
    assert "free space" in ended[0].message
    assert files(tmp_path) == set()
    assert runner.run(2, directory=str(tmp_path))[0].weights == whole


def test_a_batch_that_does_not_divide_names_the_sizes_that_do():
    """Guards the message of a wrong world size: both the batch sizes and the numbers of ranks that fit."""
    with pytest.raises(ConfigError, match=r"got 6 on 4 ranks: set it to 4 or 8, or train on 1, 2, 3 rank\(s\)"):
        Ranks(world_size=4).share_of(6)
    with pytest.raises(ConfigError, match=r"got 3 on 8 ranks: set it to 8, or train on 1, 3 rank\(s\)"):
        Ranks(world_size=8).share_of(3)
    assert [Ranks(rank=rank, world_size=2).share_of(6) for rank in (0, 1)] == [slice(0, 3), slice(3, 6)]
    assert ALONE.share_of(5) == slice(0, 5)


@pytest.mark.parametrize(("local_rank", "told"), [("0", "4"), ("3", None)], ids=["torchrun", "another launcher"])
def test_more_ranks_than_gpus_is_one_line(monkeypatch, local_rank, told):
    """Guards against CUDA's own error: the first rank says it too, where torchrun tells how many there are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if told:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    with pytest.raises(ConfigError, match=r"must be 1\.\.2, its number of GPUs, got 4: start .*--nproc_per_node 2, or"):
        join_ranks(1.0).__enter__()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with join_ranks(1.0) as ranks:
        assert ranks.device == "cuda:1"

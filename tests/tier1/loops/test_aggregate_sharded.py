"""A fold in shards: the candidate of one task to its digest, whatever a shard does."""

from __future__ import annotations

from pathlib import Path

import pytest

from fednested_lib.errors import ConfigError
from fednested_lib.snapshot import expert_of
from tests.federation import Device, make_federation
from tier1.federation import Federation
from tier1.loops import aggregate_sharded
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.genesis import ensure_genesis
from tier1.loops.records import CandidateRef, CutRef
from tier1.versions import shards


def with_cut(directory: Path, **options: object) -> tuple[Federation, CutRef]:
    fed = make_federation(directory, **options)
    ensure_genesis(fed)
    for rank, client in enumerate(("ann", "bob", "cyd"), 1):
        Device(fed, client).send(base=0, rank=rank)
    Device(fed, "ann").append(b"{}", b"")  # a refused record is part of a candidate, too
    return fed, take_updates(fed)


def folded(fed: Federation, cut: CutRef, n_shards: int) -> CandidateRef:
    plan, numbers = aggregate_sharded.plan_fold(fed, cut, n_shards)
    done = [aggregate_sharded.fold_shard(fed, plan, number) for number in numbers]
    return aggregate_sharded.collect_fold(fed, cut, plan, done)


@pytest.fixture
def cut(tmp_path: Path) -> tuple[Federation, CutRef]:
    return with_cut(tmp_path)


@pytest.mark.parametrize("n_shards", [1, 3, 1000])
def test_shards_make_the_candidate_of_one_task(cut: tuple[Federation, CutRef], n_shards: int) -> None:
    """Blobs, rows, refusals: the same digest in 1, 3 and more shards than there are slices."""
    assert folded(*cut, n_shards) == fold_updates(*cut)


def test_each_slice_is_in_one_shard(cut: tuple[Federation, CutRef]) -> None:
    """None twice, none left out, and none of those that no update moves."""
    fed, ref = cut
    plan = aggregate_sharded.load_plan(fed, aggregate_sharded.plan_fold(fed, ref, 5)[0])
    slices = [key for shard in range(5) for key in shards.slices_of(plan, shard)]
    assert sorted(slices) == sorted(key for key in plan.draft.blobs if expert_of(key))
    assert len(slices) == len(set(slices))


def test_a_shard_that_failed_or_lost_a_blob_is_folded_by_who_collects(cut: tuple[Federation, CutRef]) -> None:
    """One shard never ran, one ran and a blob of it is gone: the candidate is the same."""
    fed, ref = cut
    plan, numbers = aggregate_sharded.plan_fold(fed, ref, 4)
    done = [None, *(aggregate_sharded.fold_shard(fed, plan, number) for number in numbers[1:])]
    parent = fed.chain.state().head.blobs
    made = aggregate_sharded._made(fed, plan, 2)
    lost = next(digest for key, digest in made.items() if digest != parent[key])
    Path(fed.blobs.location(lost)).unlink()
    candidate = aggregate_sharded.collect_fold(fed, ref, plan, done)
    assert fed.blobs.has(lost)
    assert candidate == fold_updates(fed, ref)


def test_a_second_attempt_folds_nothing_again(cut: tuple[Federation, CutRef], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shard made is in the store: a retry, and who collects, read it."""
    fed, ref = cut
    plan, numbers = aggregate_sharded.plan_fold(fed, ref, 2)
    done = [aggregate_sharded.fold_shard(fed, plan, number) for number in numbers]
    monkeypatch.setattr(shards, "fold_experts", None)
    assert [aggregate_sharded.fold_shard(fed, plan, number) for number in numbers] == done
    assert aggregate_sharded.collect_fold(fed, ref, plan, done).n_accepted == 3


def test_a_machine_of_another_kind_folds_no_shard(
    cut: tuple[Federation, CutRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identical bytes are promised for one profile and code: slices of two would be a version that no replay finds."""
    fed, ref = cut
    plan, _ = aggregate_sharded.plan_fold(fed, ref, 2)
    monkeypatch.setattr(shards, "code_version", lambda: "another")
    with pytest.raises(ConfigError, match="folds as another.*one image and one kind of machine"):
        aggregate_sharded.fold_shard(fed, plan, 0)
    with pytest.raises(ConfigError, match="one kind of machine"):
        aggregate_sharded.collect_fold(fed, ref, plan, [None, None])


@pytest.mark.parametrize(
    "aggregation",
    [{"outer": {"kind": "nesterov"}}, {"rule": "coordinate_median"}],
    ids=["outer optimiser", "dense blocks"],
)
def test_a_fold_that_is_no_plain_sum_is_made_where_it_is_collected(tmp_path: Path, aggregation: dict) -> None:
    """The same workflow for every configuration; it has no shards, and the candidate of one task."""
    fed, ref = with_cut(tmp_path, aggregation=aggregation)
    assert aggregate_sharded.plan_fold(fed, ref, 3) == ("", [])
    assert aggregate_sharded.collect_fold(fed, ref, "", []) == fold_updates(fed, ref)


def test_the_probe_judges_what_shards_made(tmp_path: Path) -> None:
    """What the probe refuses is left out of both candidates, and they are one."""
    fed, ref = with_cut(tmp_path, aggregation={"probe": 0.0})
    candidate = folded(fed, ref, 3)
    assert candidate.n_refused > 1, "the probe refused nothing: the test shows nothing"
    assert candidate == fold_updates(fed, ref)


def test_an_empty_cut_and_wrong_shards(cut: tuple[Federation, CutRef]) -> None:
    """Nothing arrived: no plan, no candidate; a number of shards out of bounds is named; so is a plan that is gone."""
    fed, ref = cut
    empty = CutRef(path="", n_records=0, topic=ref.topic)
    assert aggregate_sharded.plan_fold(fed, empty, 3) == ("", [])
    assert aggregate_sharded.collect_fold(fed, empty, "", []).digest == ""
    with pytest.raises(ConfigError, match=r"shards must be 1\.\.1024, got 0"):
        aggregate_sharded.plan_fold(fed, ref, 0)
    with pytest.raises(ConfigError, match="run aggregate_experts_sharded again"):
        aggregate_sharded.fold_shard(fed, "ab" * 32, 0)

"""A core update with safeguards: what it may look at, what it leaves to the next one, and an exact retry."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from structlog.testing import capture_logs

from fednested_lib.errors import ConfigError, PolicyDenied, TrainingError
from fednested_lib.snapshot import read_state_dict
from tests.federation import make_workspace, write_text
from tier1.config import load_tier1
from tier1.federation import open_federation
from tier1.loops.core_round import last_state
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import settle_candidate
from tier1.loops.memory import chosen_safeguards
from tier1.training.backends import TorchBackend

EVERY = {
    "rehearsal": {"datasets": {"old-a": "data/old-a.jsonl", "old-b": "data/old-b.jsonl"}, "rows": 20},
    "replay": {"weight": 0.5, "rows": 2},
    "distillation": {"weight": 1.0, "rows": 2},
    "ewc": {"weight": 10.0, "rows": 6, "decay": 0.5},
    "freeze": {"share": 0.4},
    "frequencies": {"core": 2, "router": None, "experts": [1, 2]},
}


def workspace(directory, **safeguards):
    write_text(directory / "data/old-a.jsonl", 40, 3)
    write_text(directory / "data/old-b.jsonl", 400, 4)
    core = {"steps": 6, "batch_size": 2, "seq_len": 16, "learning_rate": 1e-3, "threads": 1, "checkpoint_every": 2}
    return make_workspace(directory, core=core | {"safeguards": safeguards})


def with_safeguards(fed, **changes):
    given = fed.config.core.safeguards.model_copy(update=changes)
    core = fed.config.core.model_copy(update={"safeguards": given})
    return replace(fed, config=fed.config.model_copy(update={"core": core}))


@pytest.fixture
def fed(tmp_path):
    return open_federation(workspace(tmp_path, **EVERY))


def trained(fed, run):
    return train_delta(fed, pack_datasets(fed, authorise_training(fed, run)), run)


def record_of(fed, ref):
    return json.loads((fed.home / "dense" / f"{ref.update_id}.json").read_bytes())


def test_a_run_leaves_the_fisher_information_that_the_next_one_takes_up(fed):
    """Guards the chain of memories: version 2 carries run 2's own Fisher and half of version 1's."""
    with capture_logs() as events:
        first = trained(fed, "r1")
    assert [event["base"] for event in events if event["event"] == "core_update.no_fisher"] == [0]
    assert settle_candidate(fed, fold_dense(fed, first)).status == "head"
    with capture_logs() as events:
        second = trained(fed, "r2")
    assert "core_update.no_fisher" not in {event["event"] for event in events}
    assert settle_candidate(fed, fold_dense(fed, second)).version == 2
    versions, own = fed.chain.state().versions, record_of(fed, second)["dense"]["fisher"]
    one, two = (
        read_state_dict(replace(versions[n].snapshot, blobs=dict(versions[n].fisher)), fed.blobs) for n in (1, 2)
    )
    own = read_state_dict(replace(versions[2].snapshot, blobs=own), fed.archive)
    assert one.keys() == read_state_dict(versions[2].snapshot, fed.blobs).keys()
    for name in one:
        assert (two[name] - (own[name] + 0.5 * one[name])).abs().max() <= 1e-6 * two[name].abs().max()


def test_bad_rows_of_old_text_are_counted_and_located(fed, tmp_path):
    """Guards that old text is told of like any other: how many rows are set aside, of which dataset, and where."""
    with (tmp_path / "data/old-a.jsonl").open("a") as file:
        file.write("{\n")
    with capture_logs() as events:
        trained(fed, "r1")
    counts = {event["dataset"]: event["set_aside"] for event in events if event["event"] == "core_update.rehearsed"}
    assert counts == {"old-a": 1, "old-b": 0}
    (record,) = map(json.loads, (fed.home / "rehearsal/old-a/set_aside.jsonl").read_text().splitlines())
    assert (record["dataset"], record["reason"]) == ("old-a", "not JSON")


def test_with_a_schedule_over_several_runs_the_next_one_goes_on_with_its_safeguards(fed):
    """Guards `core.schedule_steps`: run 2 begins at step 7 with what slow groups collected, and protects version 1."""
    longer = fed.config.core.model_copy(update={"schedule_steps": 40})
    fed = replace(fed, config=fed.config.model_copy(update={"core": longer}))
    assert settle_candidate(fed, fold_dense(fed, trained(fed, "r1"))).status == "head"
    kept = last_state(fed)
    assert kept.progress.step == 6
    assert any(".collected." in name for name in kept.state)
    with capture_logs() as events:
        second = trained(fed, "r2")
    assert [event["steps"] for event in events if event["event"] == "core.trained"] == [6]
    assert last_state(fed).progress.step == 12
    assert settle_candidate(fed, fold_dense(fed, second)).version == 2
    assert fed.chain.state().head.fisher != fed.chain.state().versions[1].fisher


def test_a_killed_run_goes_on_to_the_same_delta_and_fisher(fed, monkeypatch):
    """Guards exact resume through the loop; checkpoints of other safeguards, or of other old text, are refused."""
    assert settle_candidate(fed, fold_dense(fed, trained(fed, "first"))).status == "head"
    whole = record_of(fed, trained(fed, "whole"))
    step, taken = TorchBackend.step, []

    def dies(self, rows, rate):
        taken.append(rate)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return step(self, rows, rate)

    monkeypatch.setattr(TorchBackend, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(fed, "killed")
    with pytest.raises(TrainingError, match=r"another run.*safeguards\.replay"):
        trained(with_safeguards(fed, replay=None), "killed")
    fewer = fed.config.core.safeguards.rehearsal.model_copy(update={"rows": 10})
    with pytest.raises(TrainingError, match=r"another run.*safeguards\.memory"):
        trained(with_safeguards(fed, rehearsal=fewer), "killed")
    resumed = record_of(fed, trained(fed, "killed"))
    assert len(taken) == 6 + 2, "steps 5 and 6 were left"
    assert resumed["dense"]["blobs"] == whole["dense"]["blobs"]
    assert resumed["dense"]["fisher"] == whole["dense"]["fisher"]


def test_old_text_needs_a_grant_of_its_own(fed, tmp_path):
    """Guards governance: whoever may train on new text but not on a dataset of old domains starts no run."""
    policy = fed.config.governance.policy
    document = yaml.safe_load(policy.read_text())
    barred = {"id": "no-old-b", "groups": ["public"], "actions": ["train"], "resources": ["dataset:old-b"]}
    data = pack_datasets(fed, authorise_training(fed, "r"))
    policy.write_text(yaml.safe_dump(document | {"deny": [*document.get("deny", []), barred]}))
    strict = open_federation(tmp_path / "tier1.yaml")
    with pytest.raises(PolicyDenied, match="old-b"):
        authorise_training(strict, "r")
    with pytest.raises(PolicyDenied, match="old-b"):
        train_delta(strict, data, "r")


def test_each_safeguard_is_off_unless_it_is_given(tmp_path):
    """Guards the configuration: none by default, one alone, and all as they are written."""
    fed = open_federation(workspace(tmp_path))
    assert chosen_safeguards(fed) is None
    alone = chosen_safeguards(open_federation(workspace(tmp_path / "b", ewc={"weight": 2.0})))
    assert (alone.ewc.weight, alone.replay, alone.freeze) == (2.0, None, None)
    every = chosen_safeguards(open_federation(workspace(tmp_path / "c", **EVERY)))
    assert None not in (every.replay, every.distillation, every.ewc, every.freeze)
    assert (every.frequencies.core, every.frequencies.router, every.frequencies.experts) == (2, None, [1, 2])


@pytest.mark.parametrize(
    ("safeguards", "said"),
    [
        ({"replay": {}}, "replay needs text of old domains, got none: set rehearsal.datasets"),
        ({"ewc": {"weight": -1}}, "ewc.weight"),
        ({"frequencies": {"core": 0}}, "frequencies.core"),
        ({"freeze": {"share": 0.5}}, "freeze needs text of old domains"),
        ({"rehearsal": {"datasets": {"plays": "data/old-a.jsonl"}}, "replay": {}}, "dataset plays must be one file"),
        (
            {"rehearsal": EVERY["rehearsal"], "ewc": EVERY["ewc"], "frequencies": {}},
            "rehearsal must be read by one of replay, distillation, freeze, got none of them",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, safeguards, said):
    """Guards the bounds: a wrong section names itself and starts nothing."""
    with pytest.raises(ConfigError) as refused:
        load_tier1(workspace(tmp_path, **safeguards))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)

"""Which rows a core update takes, how it reads them, with what optimiser: from tier1.yaml to checkpoint and lineage."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
from structlog.testing import capture_logs

from fednested_lib.errors import ConfigError, TrainingError
from tests.federation import make_workspace, write_text
from tier1.config import load_tier1
from tier1.federation import open_federation
from tier1.loops.core_update import authorise_training, pack_datasets, train_delta
from tier1.training.backends import TorchBackend
from tier1.training.settings import TrainSettings

CORE = {"steps": 6, "batch_size": 4, "seq_len": 16, "learning_rate": 1e-3, "threads": 1, "checkpoint_every": 2}

# A value that is not the usual one, and the usual one.
OPTIMISED = {
    "expert_learning_rate": (1e-4, None),
    "router_learning_rate": (0.0, None),
    "weight_decay": (0.0, 0.1),
    "aux_loss": (1.0, 0.02),
    "grad_clip": (0.01, 1.0),
}


def workspace(directory, **core):
    write_text(directory / "data/more.jsonl", 50, 5)
    datasets = {"prose": "data/train.jsonl", "verse": "data/more.jsonl"}
    return make_workspace(directory, core=CORE | {"datasets": datasets} | core)


def other(fed, **core):
    return replace(fed, config=fed.config.model_copy(update={"core": fed.config.core.model_copy(update=core)}))


def trained(fed, run):
    return train_delta(fed, pack_datasets(fed, authorise_training(fed, run)), run)


def record_of(fed, ref):
    return json.loads((fed.home / "dense" / f"{ref.update_id}.json").read_bytes())


def dies_at(step, monkeypatch):
    taken, take = [], TorchBackend.step

    def dying(self, rows, rate):
        taken.append(rows)
        if len(taken) == step:
            raise KeyboardInterrupt
        return take(self, rows, rate)

    monkeypatch.setattr(TorchBackend, "step", dying)


@pytest.mark.parametrize(
    ("chosen", "changed", "named"),
    [
        ({"mixture": {"prose": 1, "verse": 3}}, {"mixture": {"prose": 1, "verse": 2}}, r"settings\.mixture"),
        ({"mixture": {"prose": 1, "verse": 3}}, {"mixture": None}, r"settings\.mixture"),
        ({"document_masks": True}, {"document_masks": False}, r"settings\.document_end"),
        *[({key: value}, {key: usual}, rf"settings\.{key}") for key, (value, usual) in OPTIMISED.items()],
    ],
)
def test_it_is_part_of_what_the_run_is(tmp_path, monkeypatch, chosen, changed, named):
    """Guards identity and exact resume: another run's checkpoints are refused; its own end in the same delta."""
    fed = open_federation(workspace(tmp_path, **chosen))
    whole, plain = record_of(fed, trained(fed, "whole")), record_of(fed, trained(other(fed, **changed), "other"))
    assert whole["dense"]["blobs"] != plain["dense"]["blobs"], "it reaches the training"
    dies_at(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        trained(fed, "killed")
    with pytest.raises(TrainingError, match=rf"another run.*{named}"):
        trained(other(fed, **changed), "killed")
    assert record_of(fed, trained(fed, "killed"))["dense"]["blobs"] == whole["dense"]["blobs"]


def test_the_optimiser_is_recorded_where_it_is_not_the_usual(tmp_path):
    """Guards lineage: it says what was set, and of a run that sets nothing what it said before there were such keys."""
    plain, chosen = (
        open_federation(workspace(tmp_path / "a")),
        open_federation(workspace(tmp_path / "b", grad_clip=0.5)),
    )
    for fed in (plain, chosen):
        trained(fed, "run")
    said, set_ = (next(fed.home.rglob("lineage.jsonl")).read_text().replace("\\", "") for fed in (plain, chosen))
    assert not [key for key in OPTIMISED if key in said]
    assert [key for key in OPTIMISED if key in set_] == ["grad_clip"]


def test_what_is_left_out_of_the_optimiser_is_what_it_was(tmp_path):
    """Guards upgrades: the defaults of tier1.yaml are the trainer's, so weights and checkpoints stay what they are."""
    core = load_tier1(workspace(tmp_path)).core
    assert {key: getattr(core, key) for key in OPTIMISED} == {key: usual for key, (_, usual) in OPTIMISED.items()}
    settings = TrainSettings(steps=1)
    assert {key: getattr(settings, key) for key in OPTIMISED} == {key: usual for key, (_, usual) in OPTIMISED.items()}


@pytest.mark.parametrize(
    ("core", "said"),
    [
        ({"expert_learning_rate": -0.1}, "core.expert_learning_rate"),
        ({"router_learning_rate": 2}, "core.router_learning_rate"),
        ({"weight_decay": 1.5}, "core.weight_decay"),
        ({"aux_loss": float("nan")}, "core.aux_loss"),
        ({"grad_clip": 0}, "core.grad_clip"),
        ({"grad_clip": float("inf")}, "core.grad_clip"),
        ({"lora": {}, "router_learning_rate": 0.1}, "router_learning_rate must be left out"),
        ({"lora": {"targets": ["q_proj"]}, "expert_learning_rate": 0.1}, "add gate_up_proj to lora.targets"),
    ],
    ids=str,
)
def test_an_optimiser_out_of_bounds_is_refused(tmp_path, core, said):
    """Guards tier1.yaml: every key is bounded, and a rate that nothing would have is not passed over in silence."""
    with pytest.raises(ConfigError) as refused:
        load_tier1(workspace(tmp_path, **core))
    assert said in str(refused.value)


def test_a_mixture_is_recorded(tmp_path):
    """Guards that event and lineage say what was weighted and how rows were read."""
    fed = open_federation(workspace(tmp_path, mixture={"verse": 0.75, "prose": 0.25}, document_masks=True))
    with capture_logs() as events:
        trained(fed, "run")
    lineage = next(fed.home.rglob("lineage.jsonl")).read_text().replace("\\", "")  # JSON within JSON
    (event,) = [event for event in events if event["event"] == "core.trained"]
    assert event["mixture"] == {"prose": 0.25, "verse": 0.75}
    assert "document_masks" in lineage
    assert '{"prose":0.25,"verse":0.75}' in lineage


def test_low_rank_is_recorded(tmp_path):
    """Guards that lineage tells what was trained in place of the weights, and how these were held."""
    fed = open_federation(workspace(tmp_path, lora={"rank": 2, "quantize": "int4"}))
    trained(fed, "run")
    lineage = next(fed.home.rglob("lineage.jsonl")).read_text().replace("\\", "")
    assert '"quantize":"int4","rank":2' in lineage


def test_a_run_without_either_is_what_it_was(tmp_path, monkeypatch):
    """Guards upgrades: a checkpoint from before there were such settings names neither, and is this run's."""
    fed = open_federation(workspace(tmp_path))
    dies_at(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt), capture_logs():
        trained(fed, "killed")
    (file,) = (fed.home / "dense").glob("*.checkpoints/checkpoint-0.safetensors")
    header = file.read_bytes()[:8192]
    assert b"settings.seed" in header
    assert b"document_end" not in header
    assert b"mixture" not in header


@pytest.mark.parametrize(
    "mixture", [{"prose": 1}, {"prose": 1, "verse": 1, "drama": 1}, {}, {"prose": 1, "verse": 0}], ids=str
)
def test_weights_that_fit_no_dataset_are_refused(tmp_path, mixture):
    """Guards tier1.yaml: each dataset has one weight above 0; the message has the names."""
    with pytest.raises(ConfigError, match=r"core.*(prose, verse|greater than 0|above 0)"):
        load_tier1(workspace(tmp_path, mixture=mixture))


def test_both_are_off_unless_they_are_given(tmp_path):
    """Guards the default: rows as they come, each once, read across documents as devices and suites read them."""
    core = load_tier1(workspace(tmp_path)).core
    assert (core.mixture, core.document_masks) == (None, False)
    assert (TrainSettings(steps=1).mixture, TrainSettings(steps=1).document_end) == (None, None)


def test_duplicates_of_parquet_and_jsonl_reach_rows_and_events(tmp_path):
    """Guards that `core.dedupe` looks across formats, from genesis, which trains the tokenizer, to packed rows."""
    path = workspace(tmp_path, dedupe=True, datasets={"prose": "data/train.jsonl", "verse": "data/copy.parquet"})
    lines = (tmp_path / "data/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = list(dict.fromkeys(json.loads(line)["text"] for line in lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "data/copy.parquet")
    fed = open_federation(path)
    with capture_logs() as events:
        packed = pack_datasets(fed, authorise_training(fed, "one"))
        whole = pack_datasets(other(fed, dedupe=False), authorise_training(fed, "two"))
    (said, silent) = (event for event in events if event["event"] == "core_update.packed")
    assert said["duplicates"] == {"prose": len(lines) - len(texts), "verse": len(texts)}
    assert silent["duplicates"] == {}
    assert packed.n_set_aside == len(lines)
    assert whole.n_tokens > packed.n_tokens

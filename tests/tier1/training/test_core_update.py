from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from structlog.testing import capture_logs

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ConfigError, TrainingError
from fednested_lib.snapshot import (
    SnapshotManifest,
    decode_blob,
    describe_config,
    read_state_dict,
    slice_state_dict,
    write_state_dict,
)
from tier1.training.backends import TorchBackend
from tier1.training.checkpoint import Checkpoints
from tier1.training.core_update import train_core_update
from tier1.training.data import prepare_dataset
from tier1.training.deepspeed_backend import DeepSpeedBackend
from tier1.training.deepspeed_config import DeepSpeedSettings
from tier1.training.model import initial_model
from tier1.training.pace import Frequencies
from tier1.training.safeguards import Ewc, Safeguards
from tier1.training.settings import TrainSettings

SETTINGS = TrainSettings(steps=3, batch_size=4, learning_rate=1e-2)


@pytest.fixture
def run(tmp_path, small_mixtral, tokenizer, texts, write_jsonl):
    """Return a function that trains from one base with given settings, and that base."""
    rows = [{"text": text} for text in texts]
    dataset = prepare_dataset({"a": write_jsonl("a.jsonl", rows)}, tokenizer, seq_len=16, out_dir=tmp_path / "packed")
    snapshots, deltas = BlobStore(tmp_path / "blobs"), BlobStore(tmp_path / "payloads")

    def train(settings=SETTINGS, tied=False, **options):
        model = initial_model("mixtral", small_mixtral | {"tie_word_embeddings": tied}, 0)
        base = SnapshotManifest(
            version=4,
            family="mixtral",
            model_config=describe_config(model.config),
            tokenizer=snapshots.put(tokenizer),
            blobs=write_state_dict(model.state_dict(), "mixtral", snapshots),
        )
        delta = train_core_update(base, snapshots, dataset, settings, deltas, **options)
        return base, snapshots, delta, deltas

    return train


def test_the_stored_slices_are_the_difference(run):
    """Guards the claim check: base slice + stored slice, key by key, is a model that learned; the base is named."""
    base, snapshots, delta, deltas = run()
    assert (delta.base_version, delta.base_digest) == (4, base.digest)
    assert set(delta.blobs) == set(base.blobs)
    before = dict(slice_state_dict(read_state_dict(base, snapshots), "mixtral"))
    for key, digest in delta.blobs.items():
        difference = decode_blob(deltas.get(digest))
        assert {name: array.shape for name, array in difference.items()} == {
            name: array.shape for name, array in before[key].items()
        }
    assert delta.report.loss_last < delta.report.loss_first


def test_equal_runs_give_equal_digests(run):
    """Guards that a core update that runs twice is the same input."""
    assert run()[2] == run()[2]


def test_unchanged_slices_are_absent(run):
    """Guards that an expert that training did not move keeps its blob in the next snapshot."""
    frozen = TrainSettings(steps=2, batch_size=4, learning_rate=1e-2, expert_learning_rate=0.0)
    _, _, delta, _ = run(frozen)
    assert delta.blobs
    assert all(key.startswith("core/") for key in delta.blobs)


def test_a_tied_head_is_moved_once(run):
    """Guards that tied weights, one tensor under two names, yield one difference."""
    _, _, delta, deltas = run(tied=True)
    rest = decode_blob(deltas.get(delta.blobs["core/rest"]))
    assert "model.embed_tokens.weight" in rest
    assert "lm_head.weight" not in rest


def test_a_failed_run_stores_nothing(run, tmp_path, monkeypatch):
    """Guards that a diverged training leaves no partial delta behind."""
    monkeypatch.setattr("tier1.training.backends.TorchBackend.step", lambda self, rows, rate: torch.nan)
    with pytest.raises(TrainingError):
        run()
    assert not list(BlobStore(tmp_path / "payloads").digests())


def test_safeguards_are_never_left_out_in_silence(run):
    """Guards that an engine that has no safeguards is refused when they are asked for."""
    with pytest.raises(ConfigError, match=r"core\.safeguards must be off with the engine TorchBackend"):
        run(backend=TorchBackend(), safeguards=Safeguards(ewc=Ewc(weight=1.0)))


def test_an_engine_that_names_tied_weights_once_gives_the_same_fisher(run, monkeypatch):
    """Guards EWC on a tied model: DeepSpeed's weights have one name, a model's state two; both are whole."""
    options = {"tied": True, "safeguards": Safeguards(ewc=Ewc(weight=1.0))}
    _, _, delta, _ = run(**options)
    twice = TorchBackend.state_dict
    monkeypatch.setattr(
        TorchBackend, "state_dict", lambda self: {k: v for k, v in twice(self).items() if k != "lm_head.weight"}
    )
    assert run(**options)[2] == delta
    assert delta.fisher


def test_a_fisher_that_does_not_fit_is_one_error_with_a_way_out(run, monkeypatch):
    """Guards what is said when memory ends after the last step: no raw error of torch, and nothing is stored."""

    def starved(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("tier1.training.core_update.fisher_diagonal", starved)
    with pytest.raises(TrainingError, match=r"for the Fisher information .*: cut .*core\.deepspeed.offload"):
        run(safeguards=Safeguards(ewc=Ewc(weight=1.0)))


class Stop(Exception):
    """Ends a run after the checkpoint of its first step."""


def stop(step, loss):
    if step % 3 == 2:
        raise Stop


class TorchInItsPlace(TorchBackend, DeepSpeedBackend):
    """The settings of DeepSpeed, the steps of torch: what a run is does not depend on whether DeepSpeed is there."""

    def __init__(self, chosen):
        DeepSpeedBackend.__init__(self, chosen)


def test_a_run_in_bf16_goes_on_in_bf16_alone(run, tmp_path):
    """Guards the precision as part of what a run is; the other settings of an engine are not."""
    whole, half = (TorchInItsPlace(DeepSpeedSettings(bf16=bf16)) for bf16 in (False, True))
    for name, begun, other in (("half", half, TorchBackend()), ("whole", whole, half)):
        place = Checkpoints(directory=tmp_path / name, every=1)
        with pytest.raises(Stop):
            run(backend=begun, checkpoints=place, on_step=stop)
        with pytest.raises(
            TrainingError, match=r"its deepspeed\.bf16 is (True|None), this run's is (True|None); train"
        ):
            run(backend=other, checkpoints=place)
        assert run(backend=begun, checkpoints=place)[2] == run()[2]
    with pytest.raises(Stop):
        run(checkpoints=replace(place, directory=tmp_path / "before"), on_step=stop)
    assert run(backend=whole, checkpoints=replace(place, directory=tmp_path / "before"))[2] == run()[2]


def test_a_run_goes_on_with_the_moments_that_it_took_over(run, tmp_path):
    """Guards the optimiser state of the run before as part of what a run is; weights in it are not used."""
    first = run(replace(SETTINGS, steps=6, last_step=3), keep_state=True)[2]
    later = replace(SETTINGS, steps=6, first_step=3)
    place = Checkpoints(directory=tmp_path / "run", every=1)
    with pytest.raises(Stop):
        run(later, moments=first.state, checkpoints=place, on_step=stop)
    name = "optimizer.exp_avg.lm_head.weight"
    with pytest.raises(TrainingError, match=r"its moments is [0-9a-f]{64}, this run's is [0-9a-f]{64}; train"):
        run(later, moments=first.state | {name: first.state[name] * 1.5}, checkpoints=place)
    weights = {name: tensor * 0 for name, tensor in first.state.items() if name.startswith("model.")}
    assert run(later, moments=first.state | weights, checkpoints=place)[2] == run(later, moments=first.state)[2]


def test_collected_gradients_that_no_slow_group_takes_are_told(run):
    """Guards the hand-over to other frequencies: what is left of the run before is an event, not silence."""

    def dropped(frequencies):
        chosen = Safeguards(frequencies=frequencies) if frequencies else None
        with capture_logs() as events:
            run(replace(SETTINGS, steps=6, first_step=3), moments=first.state, safeguards=chosen)
        return [event["parameters"] for event in events if event["event"] == "core.collected_dropped"]

    slow = Frequencies(core=2, router=2, experts=(1, 2))
    first = run(replace(SETTINGS, steps=6, last_step=3), safeguards=Safeguards(frequencies=slow), keep_state=True)[2]
    held = sum(bool(tensor.any()) for name, tensor in first.state.items() if ".collected." in name)
    assert dropped(slow) == []
    assert dropped(None) == dropped(Frequencies(router=None)) == [held]
    assert dropped(Frequencies(core=2, experts=(3, None))) == [2], "the two routers'"

from __future__ import annotations

import pytest
import torch

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
from tier1.training.core_update import train_core_update
from tier1.training.data import prepare_dataset
from tier1.training.model import initial_model
from tier1.training.safeguards import Ewc, Safeguards
from tier1.training.settings import TrainSettings

SETTINGS = TrainSettings(steps=3, batch_size=4, learning_rate=1e-2)


@pytest.fixture
def run(tmp_path, small_mixtral, tokenizer, texts, write_jsonl):
    """Return a function that trains from one base with given settings, and that base."""
    rows = [{"text": text} for text in texts]
    dataset = prepare_dataset({"a": write_jsonl("a.jsonl", rows)}, tokenizer, seq_len=16, out_dir=tmp_path / "packed")
    snapshots, deltas = BlobStore(tmp_path / "blobs"), BlobStore(tmp_path / "payloads")

    def train(settings=SETTINGS, backend=None, safeguards=None, **changes):
        model = initial_model("mixtral", small_mixtral | changes, 0)
        base = SnapshotManifest(
            version=4,
            family="mixtral",
            model_config=describe_config(model.config),
            tokenizer=snapshots.put(tokenizer),
            blobs=write_state_dict(model.state_dict(), "mixtral", snapshots),
        )
        delta = train_core_update(base, snapshots, dataset, settings, deltas, backend=backend, safeguards=safeguards)
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
    _, _, delta, deltas = run(tie_word_embeddings=True)
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
    with pytest.raises(ConfigError, match=r"core\.safeguards must be off with another engine"):
        run(backend=TorchBackend(), safeguards=Safeguards(ewc=Ewc(weight=1.0)))

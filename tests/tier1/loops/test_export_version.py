"""A version as transformers reads it: the same bits, whole or not there."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fednested_lib.errors import ChainError, ConfigError, SnapshotError, StorageError
from fednested_lib.snapshot import read_state_dict
from fednested_lib.text import end_of_text_id, load_tokenizer
from tests.federation import make_federation
from tier1 import commands
from tier1.loops.export_version import export_version
from tier1.loops.genesis import ensure_genesis
from tier1.training.model import pretrained_model, pretrained_tokenizer
from tier1.training.tokenizer import train_tokenizer
from tier1.versions.model_export import tokenizer_files


@pytest.fixture
def fed(tmp_path):
    """A federation of one version."""
    fed = make_federation(tmp_path / "fed")
    ensure_genesis(fed)
    return fed


def test_transformers_reads_the_bits_of_the_version(fed, tmp_path):
    """In many files as in one, through transformers as through the genesis of another chain; with its own tokenizer."""
    head = fed.chain.state().head
    state = read_state_dict(head.snapshot, fed.blobs)
    for name, shard_gb in (("one", 5.0), ("many", 0.0001)):
        out = tmp_path / name
        assert export_version(fed, out, 0, shard_gb=shard_gb) == 0
        read = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).state_dict()
        model = pretrained_model(out, head.family)
        for found in (read, model.state_dict()):
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert pretrained_tokenizer(out, model.config.vocab_size) == fed.blobs.get(head.tokenizer)
        assert json.loads((out / "fednested.json").read_bytes())["base_digest"] == head.base_digest
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_transformers_cuts_text_as_the_version_was_trained(tmp_path, family):
    """Some families have a tokenizer class that cuts digits and accents otherwise than `tokenizer.json` says."""
    texts = [
        f"call {7919 * n % 10_000} or {104_729 * n % 100_000}, it's cafe\u0301 {n:02}:{n:02} " for n in range(60)
    ] * 5
    tokenizer = train_tokenizer(texts, 400)
    for name, data in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    read, ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True), load_tokenizer(tokenizer)
    assert read(texts[0], add_special_tokens=False)["input_ids"] == ours.encode(texts[0], add_special_tokens=False).ids
    assert (read.eos_token_id, len(read)) == (end_of_text_id(ours), ours.get_vocab_size())


def test_the_command_writes_the_champion(fed, tmp_path, monkeypatch):
    """Without a number it is the champion; what was written is said."""
    monkeypatch.setattr("tier1.federation.open_federation", lambda path: fed)
    done = CliRunner().invoke(commands.app, ["export", "--config", "tier1.yaml", "--out", str(tmp_path / "out")])
    assert done.stdout == f"version 0 written to {tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "config.json").exists()


def test_what_cannot_be_written_leaves_nothing(fed, tmp_path, monkeypatch):
    """An unknown version, a place that is taken, a lost blob, a full disk: one error, and no half of a model."""
    with pytest.raises(ChainError, match=r"version must be 0..0, got 7"):
        export_version(fed, tmp_path / "out", 7)
    with pytest.raises(ConfigError, match="exists: give --out a directory that does not"):
        export_version(fed, tmp_path)

    def full(self, directory, **options):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(StorageError, match="No space left on device.*: free space"):
        export_version(fed, tmp_path / "out")
    lost = fed.chain.state().head.tokenizer
    (path,) = (path for path in (tmp_path / "fed").rglob(f"{lost}*") if path.is_file())
    path.unlink()
    monkeypatch.undo()
    with pytest.raises(SnapshotError):
        export_version(fed, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["fed"]

"""How a chain begins: whose text it may read, and where in the log it starts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from fednested_lib.errors import ConfigError, PolicyDenied
from fednested_lib.snapshot import read_state_dict
from tests.federation import SMALL_MODEL, Device, make_federation
from tier1.config import ModelConfig
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.core_update import authorise_training, pack_datasets
from tier1.loops.genesis import ensure_genesis
from tier1.training.model import initial_model
from tier1.training.tokenizer import train_tokenizer
from tier1.versions.candidates import load_candidate

OLMOE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def changed(fed, **sections):
    return dataclasses.replace(fed, config=fed.config.model_copy(update=sections))


def test_genesis_needs_a_policy_that_allows_its_text(tmp_path):
    """The first cut of a fresh home trains a tokenizer on governed text: with nothing allowed no chain comes about."""
    fed = make_federation(tmp_path)
    (tmp_path / "policy.yaml").write_text("version: 1\n")
    with pytest.raises(PolicyDenied, match="dataset:plays"):
        take_updates(fed)
    assert not fed.chain.exists()


def test_a_new_chain_on_an_old_topic_consumes_no_history(tmp_path):
    """A second chain on the same log begins where the topic stood; a foreign update that comes later is refused."""
    old = make_federation(tmp_path / "old", bootstrap="memory:shared")
    assert take_updates(old).n_records == 0  # makes genesis
    Device(old, "ann").send()
    new = make_federation(tmp_path / "new", bootstrap="memory:shared")
    assert take_updates(new).n_records == 0
    assert sum(new.chain.entries()[0].entry.body.offsets.values()) == 1
    Device(new, "ann").send()
    Device(new, "bob").send(federation="other")
    ref = fold_updates(new, take_updates(new))
    candidate = load_candidate(new.home, ref.digest)
    assert [row.client_id for row in candidate.accepted] == ["ann"]
    assert [row.reason for row in candidate.refused] == ["foreign_federation"]
    assert take_updates(old).n_records == 3


def test_a_chain_begins_with_an_open_model(tmp_path):
    """An open model from the disk is version 0 to the bit, with its own tokenizer; no tier-1 text is read."""
    model = initial_model("olmoe", OLMOE, 3)
    model.save_pretrained(tmp_path / "open")
    tokenizer = train_tokenizer([f"Fox {i} and dog {i * i}." for i in range(200)], 280)
    (tmp_path / "open" / "tokenizer.json").write_bytes(tokenizer)
    fed = make_federation(tmp_path / "fed")
    config = fed.config.model_copy(update={"model": ModelConfig(family="olmoe", pretrained=tmp_path / "open")})
    fed = dataclasses.replace(fed, config=config)
    head = ensure_genesis(fed).head
    assert fed.blobs.get(head.tokenizer) == tokenizer
    state = read_state_dict(head.snapshot, fed.blobs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("given", [False, True], ids=["own", "pretrained"])
def test_rows_longer_than_the_models_positions_are_refused(tmp_path, given):
    """Guards `core.seq_len`: rotary positions go on beyond what a model has, so it would train there in silence."""
    fed = make_federation(tmp_path / "fed", core={"seq_len": 129})
    if given:
        initial_model("mixtral", SMALL_MODEL | {"vocab_size": 300}, 3).save_pretrained(tmp_path / "open")
        tokenizer = train_tokenizer([f"Fox {i} and dog {i * i}." for i in range(200)], 280)
        (tmp_path / "open" / "tokenizer.json").write_bytes(tokenizer)
        fed = changed(fed, model=ModelConfig(pretrained=tmp_path / "open"))
    grant = authorise_training(fed, "run")
    with pytest.raises(ConfigError, match=r"core\.seq_len must be at most .* of 128, got 129: lower it"):
        pack_datasets(fed, grant)
    assert not (fed.home / "packed").exists()
    longest = changed(fed, core=fed.config.core.model_copy(update={"seq_len": 128}))
    assert pack_datasets(longest, grant).n_rows > 0


def test_an_open_model_brings_its_shape(tmp_path):
    """Keys that would be ignored beside `pretrained` are refused."""
    with pytest.raises(ValidationError, match="leave out config, vocab_size and seed"):
        ModelConfig(pretrained=tmp_path, vocab_size=300)

"""One local update is a function of its job: rows, adapters and bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fednested_lib.adapters import merge
from fednested_lib.blobs import BlobStore
from fednested_lib.config import Tier2Config
from fednested_lib.errors import ConfigError, DataError
from fednested_lib.expert_choice import choice_path
from fednested_lib.fixed_a import seed_of
from fednested_lib.frozen import FrozenWeight
from fednested_lib.local_update import Interrupted, Job, LocalTrainer, job_seed, window
from fednested_lib.orders import Model
from fednested_lib.snapshot import (
    SnapshotManifest,
    build_model,
    describe_config,
    expert_shapes,
    slice_key,
    write_state_dict,
)
from fednested_lib.spool import Spool


@pytest.fixture
def trainer(tmp_path, make_model, tokenizer_json) -> LocalTrainer:
    """A device that holds a snapshot and forty lines of text."""
    store, model = BlobStore(tmp_path / "home/blobs"), make_model("mixtral", vocabulary=300)
    manifest = SnapshotManifest(
        version=0,
        family="mixtral",
        model_config=describe_config(model.config),
        tokenizer=store.put(tokenizer_json),
        blobs=write_state_dict(model.state_dict(), "mixtral", store),
    )
    lines = (json.dumps({"text": f"the cat {i} sat on the mat and the cat {i * i}"}) for i in range(40))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    made = LocalTrainer(_config(tmp_path), store, Spool(tmp_path / "home/spool"))
    made.manifest = manifest
    made.held = Model(version=0, snapshot=store.put(manifest.to_json()), base_digest=manifest.digest, chain_seq=0)
    return made


def _config(directory: Path, **changes) -> Tier2Config:
    document = {
        "client_id": "romeo",
        "key": directory / "device.key",
        "home": directory / "home",
        "data": directory / "text.jsonl",
        "blobs_uri": "unused",
        "payloads_uri": "unused",
        "control": {"public_key": "0" * 64},
        "policy": {"file": "unused", "public_key": "0" * 64},
        "adapters": {"rank": 2, "alpha": 4.0, "experts": [3, 1]},
        "training": {"steps": 2, "batch_size": 2, "seq_len": 16, "learning_rate": 1e-3},
        **changes,
    }
    return Tier2Config.model_validate(document)


def _trained(trainer: LocalTrainer, sequence: int, first_row: int = 0):
    job = Job(sequence=sequence, seed=f"{sequence:032x}", model=trainer.held, first_row=first_row, n_rows=4)
    report = trainer.train(job, lambda: False)
    return report, *trainer.spool.read(sequence, expert_shapes(trainer.manifest))


def test_every_update_starts_from_its_own_adapters(trainer):
    """Another sequence number starts from another A, else all updates span one subspace; the same repeats itself."""
    name = "model.layers.0.mlp.experts.down_proj"
    first, second, again = (_trained(trainer, sequence)[2].factors[name] for sequence in (0, 1, 0))
    assert first.expert_ids == (1, 3)
    assert np.abs(first.lora_a - second.lora_a).max() > 0.1
    assert first.lora_a.tobytes() == again.lora_a.tobytes()
    assert first.lora_b.tobytes() == again.lora_b.tobytes()


def test_fixed_a_is_the_same_for_all_updates_of_a_base(trainer, tmp_path):
    """In mode fixed_a updates of one base share A, whoever makes them; another base has another; B alone is learnt."""
    name = "model.layers.0.mlp.experts.down_proj"
    adapters = {"mode": "fixed_a", "rank": 2, "alpha": 4.0}
    trainer.config = _config(tmp_path, adapters=adapters)
    (_, declaration, first), (_, _, second) = _trained(trainer, 0), _trained(trainer, 1)
    assert (declaration.adapter.mode, declaration.adapter.seed) == ("fixed_a", seed_of(trainer.manifest.digest))
    assert first.factors[name].lora_a.tobytes() == second.factors[name].lora_a.tobytes()
    assert np.abs(first.factors[name].lora_b - second.factors[name].lora_b).max() > 0
    assert np.allclose(first.factors[name].lora_a[0] @ first.factors[name].lora_a[0].T, np.eye(2), atol=1e-6)
    later = replace(trainer.manifest, version=1, blobs=_moved(trainer))
    trainer.held = Model(version=1, snapshot=trainer.blobs.put(later.to_json()), base_digest=later.digest, chain_seq=1)
    trainer.manifest = later
    assert np.abs(_trained(trainer, 2)[2].factors[name].lora_a - first.factors[name].lora_a).max() > 0.01


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_trains_on_quantised_experts(trainer, tmp_path, form):
    """`model.frozen` reaches the model that is trained; the update is one of the fp32 base, and folds into it."""
    _, plain, fp32 = _trained(trainer, 0)
    quantised = LocalTrainer(_config(tmp_path, model={"frozen": form}), trainer.blobs, trainer.spool)
    quantised.manifest, quantised.held = trainer.manifest, trainer.held
    report, declaration, delta = _trained(quantised, 1)
    assert {module.form for module in quantised._model.modules() if isinstance(module, FrozenWeight)} == {form}
    assert declaration.base_digest == plain.base_digest == trainer.manifest.digest
    assert delta.factors.keys() == fp32.factors.keys()
    assert report.loss_last > 0
    master = build_model(trainer.manifest, trainer.blobs)
    before = master.model.layers[0].mlp.experts.down_proj.clone()
    merge(master, delta)
    moved = (master.model.layers[0].mlp.experts.down_proj - before).abs().amax((1, 2))
    assert [expert for expert in range(6) if moved[expert] > 0] == [1, 3]


def _moved(trainer: LocalTrainer) -> dict[str, str]:
    """Return the blobs of the held model with one expert's matrix in another's place."""
    blobs = dict(trainer.manifest.blobs)
    first, second = (slice_key("model.layers.0.mlp.experts.down_proj", expert) for expert in (0, 1))
    return {**blobs, first: blobs[second]}


def test_seed_is_of_secret_client_epoch_sequence_and_setting(tmp_path):
    """No two secrets, devices, keys, updates or configured seeds share a seed: without the secret A0 is unknown."""
    seeds = {
        job_seed(_config(tmp_path, client_id=client, key_epoch=epoch, training={"seed": seed}), secret, sequence)
        for secret in ("0" * 64, "1" * 64)
        for client in ("romeo", "juliet")
        for epoch in (0, 1)
        for seed in (0, 1)
        for sequence in (0, 1)
    }
    assert len(seeds) == 32


def test_report_and_declaration_agree(trainer):
    """The declaration names the base, the rows and counts that the training had, and the report holds numbers only."""
    report, declaration, _ = _trained(trainer, 5, first_row=7)
    assert (declaration.base_digest, declaration.num_examples) == (trainer.manifest.digest, 4)
    assert declaration.layers() == {0: (1, 3), 1: (1, 3), 2: (1, 3)}
    assert report.tokens == 2 * 2 * 16
    assert all(0 < sum(counts) <= 2 * report.tokens for counts in declaration.routed_tokens.values())
    stored = json.loads((trainer.config.home / "trainer/reports/000000000005.json").read_bytes())
    assert stored == vars(report)
    assert all(value is None or isinstance(value, (int, float)) for value in stored.values())


def test_window_goes_round_and_repeats_no_row():
    """Consecutive windows take every row in turn; a window larger than the text is the whole text once."""
    rows = np.arange(10)
    assert window(rows, 0, 4).tolist() == [0, 1, 2, 3]
    assert window(rows, 8, 4).tolist() == [8, 9, 0, 1]
    assert window(rows, 28, 4).tolist() == [8, 9, 0, 1]
    assert sorted(window(rows, 3, 99)) == list(range(10))


def test_interrupted_training_spools_nothing(trainer):
    """A device that is told to stop leaves no half update behind."""
    job = Job(sequence=0, seed="0" * 32, model=trainer.held, first_row=0, n_rows=4)
    with pytest.raises(Interrupted):
        trainer.train(job, lambda: True)
    assert not trainer.spool.has(0)


def test_too_little_text_names_the_lengths(trainer):
    """A device with less text than one row stops with both lengths."""
    trainer.config.data.write_text('{"text": "hi"}')
    with pytest.raises(DataError, match="17"):
        _trained(trainer, 0)


def test_interrupted_job_goes_on_where_it_was(trainer, tmp_path):
    """Told to stop after the second of four steps, another trainer does the other two and spools the same bits."""
    settings = {"steps": 4, "batch_size": 2, "seq_len": 16, "learning_rate": 1e-3}
    trainer.config = _config(tmp_path, training=settings)
    _, _, whole = _trained(trainer, 0)
    trainer.spool.remove(0)
    path, asked = trainer.config.home / "trainer/checkpoint", []
    assert not path.exists()

    def stopped() -> bool:
        asked.append(True)
        return len(asked) == 2

    job = Job(sequence=0, seed="0" * 32, model=trainer.held, first_row=0, n_rows=4)
    with pytest.raises(Interrupted):
        trainer.train(job, stopped)
    assert path.exists()
    again = LocalTrainer(trainer.config, trainer.blobs, trainer.spool)
    again.manifest, again.held, asked[:] = trainer.manifest, trainer.held, [True, True]
    again.train(job, stopped)
    assert len(asked) == 4
    assert not path.exists()
    _, resumed = again.spool.read(0, expert_shapes(trainer.manifest))
    for name, factors in whole.factors.items():
        assert factors.lora_b.tobytes() == resumed.factors[name].lora_b.tobytes()
    trainer.config = _config(tmp_path, training={**settings, "learning_rate": 2e-3})
    asked.clear()
    with pytest.raises(Interrupted):
        trainer.train(job, stopped)
    asked.clear()
    again.train(job, lambda: bool(asked.append(True)))
    assert len(asked) == 4  # a checkpoint of other settings is none


def test_chosen_experts_are_adapted_and_stay(trainer, tmp_path):
    """`experts: auto` adapts the most routed experts of each layer, writes numbers alone, and keeps to them."""
    adapters = {"rank": 2, "alpha": 4.0, "experts": "auto", "budget": {"experts": 2}}
    trainer.config = _config(tmp_path, adapters=adapters)
    _, first, _ = _trained(trainer, 0)
    path = choice_path(trainer.config.home)
    chosen = json.loads(path.read_bytes())
    assert {int(layer): tuple(ids) for layer, ids in chosen["experts"].items()} == first.layers()
    assert all(len(ids) == 2 for ids in first.layers().values())
    later = replace(trainer.manifest, version=1, blobs=_moved(trainer))
    trainer.held = Model(version=1, snapshot=trainer.blobs.put(later.to_json()), base_digest=later.digest, chain_seq=1)
    trainer.manifest, data = later, path.read_bytes()
    assert _trained(trainer, 1)[1].layers() == first.layers()
    assert path.read_bytes() == data


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(trainer, tmp_path):
    """With a memory limit below the need no blob of the model is read; with one above it the update is made."""
    settings = {"steps": 2, "batch_size": 2, "seq_len": 16}
    trainer.config = _config(tmp_path, training={**settings, "memory_limit_mb": 20})
    with pytest.raises(ConfigError, match=r"memory_limit_mb = 20, training on this model takes about \d+ "):
        _trained(trainer, 0)
    assert trainer._model is None
    trainer.config = _config(tmp_path, training={**settings, "memory_limit_mb": 100_000})
    _trained(trainer, 0)


def test_router_bias_stays_here(trainer, tmp_path):
    """It trains from update to update of a base; none of its values is in a file of the spool or of a report."""
    adapters = {"rank": 2, "alpha": 4.0, "router_bias": True}
    trainer.config = _config(tmp_path, adapters=adapters)
    path = trainer.config.home / "trainer/router_bias.json"
    kept = []
    for sequence in (0, 1, 1):
        trainer.spool.remove(sequence)
        _, declaration, delta = _trained(trainer, sequence)
        kept.append(json.loads(path.read_bytes()))
        assert set(declaration.layers()) == {0, 1, 2}
        assert len(delta.factors) == 6
    assert kept[1]["before"] == kept[0]["after"] != kept[0]["before"]
    assert kept[2] == kept[1]
    values = [value for layer in kept[1]["after"].values() for value in layer]
    assert all(values)
    others = [each for each in trainer.config.home.rglob("*") if each.is_file() and each != path]
    assert any("spool" in str(each) for each in others)
    text = b"".join(each.read_bytes() for each in others)
    raw = b"".join(bytes(each) for each in _decompressed(trainer, 1))
    for value in values:
        assert repr(value).encode() not in text
        assert np.float32(value).tobytes() not in raw


def _decompressed(trainer: LocalTrainer, sequence: int):
    delta = trainer.spool.read(sequence, expert_shapes(trainer.manifest))[1]
    for factors in delta.factors.values():
        yield factors.lora_a.tobytes() + factors.lora_b.tobytes()

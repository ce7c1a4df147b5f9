"""A snapshot gives back the same bytes, names what is broken, and is fetched only where it differs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import PartitionError, SnapshotError
from fednested_lib.partition import expert_param, group_of
from fednested_lib.snapshot import (
    SnapshotManifest,
    build_model,
    decode_blob,
    describe_config,
    encode_blob,
    expert_of,
    expert_shapes,
    fetch,
    read_state_dict,
    slice_key,
    slice_state_dict,
    write_state_dict,
)

IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def _publish(model, family, store, version=3) -> SnapshotManifest:
    return SnapshotManifest(
        version=version,
        family=family,
        model_config=describe_config(model.config),
        tokenizer=store.put(b"{}"),
        blobs=write_state_dict(model.state_dict(), family, store),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_byte_exact(make_model, family, tied, tmp_path):
    """Writing, reading and building gives the same names, bytes and logits; tied weights stay tied."""
    model = make_model(family, tied=tied)
    store = BlobStore(tmp_path)
    manifest = SnapshotManifest.from_json(_publish(model, family, store).to_json())
    rebuilt = build_model(manifest, store)
    before, after = model.state_dict(), rebuilt.state_dict()
    assert list(before) == list(after)
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    assert (rebuilt.lm_head.weight is rebuilt.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in decode_blob(store.get(manifest.blobs["core/rest"]))) == (not tied)
    assert torch.equal(model(input_ids=IDS).logits, rebuilt(input_ids=IDS).logits)
    assert write_state_dict(rebuilt.state_dict(), family, store) == manifest.blobs


def test_routed_path_computes_the_same(make_model, family, tmp_path):
    """Without adapters the fednested_lora implementation is grouped_mm to the bit."""
    store = BlobStore(tmp_path)
    model = make_model(family)
    manifest = _publish(model, family, store)
    routed = build_model(manifest, store, experts="fednested_lora")
    assert routed.config._experts_implementation == "fednested_lora"
    assert torch.equal(model(input_ids=IDS).logits, routed(input_ids=IDS).logits)


def test_equal_weights_equal_digest(make_model, tmp_path):
    """The digest says nothing about the version number and everything about weights, config and tokenizer."""
    model = make_model("mixtral")
    store = BlobStore(tmp_path)
    manifest = _publish(model, "mixtral", store, version=3)
    assert _publish(model, "mixtral", store, version=4).digest == manifest.digest
    assert _publish(model, "mixtral", store, version=4).to_json() != manifest.to_json()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2, 0, 0] += 1e-6
    changed = _publish(model, "mixtral", store)
    assert changed.digest != manifest.digest
    assert [key for key in manifest.blobs if manifest.blobs[key] != changed.blobs[key]] == [
        "model.layers.0.mlp.experts.down_proj/2"
    ]
    assert dataclasses.replace(manifest, tokenizer="0" * 64).digest != manifest.digest


def test_one_blob_per_expert_and_shard(make_model, family, tmp_path):
    """Keys are one per expert slice and one per core shard; a router tensor travels with its layer's core."""
    model = make_model(family)
    slices = dict(slice_state_dict(model.state_dict(), family))
    shards = {"core/rest", "core/layers.0", "core/layers.1", "core/layers.2"}
    assert {key for key in slices if expert_of(key) is None} == shards
    experts = [expert_of(key) for key in slices if expert_of(key)]
    assert experts == sorted(experts, key=lambda place: (expert_param(place[0]), place[1]))
    assert len(experts) == sum(len(p) for name, p in model.named_parameters() if group_of(name, family) == "experts")
    assert "model.layers.0.mlp.gate.weight" in slices["core/layers.0"]
    assert all(array.dtype == np.float32 for tensors in slices.values() for array in tensors.values())


def test_expert_shapes_need_the_config_alone(make_model, family, tmp_path):
    """The shapes that a payload is checked against equal the model's own, dense layers left out."""
    model = make_model(family)
    manifest = _publish(model, family, BlobStore(tmp_path))
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if ".experts." in name}
    assert expert_shapes(manifest) == real


def test_corrupt_blob_names_slice_and_digest(make_model, tmp_path):
    """One flipped bit in a blob stops the build and says which slice and which blob."""
    store = BlobStore(tmp_path)
    manifest = _publish(make_model("mixtral"), "mixtral", store)
    key = slice_key(GATE_UP, 3)
    path = Path(store.location(manifest.blobs[key]))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(SnapshotError, match=f"{GATE_UP}/3.*{manifest.blobs[key]}") as caught:
        build_model(manifest, store)
    assert caught.value.reason == "corrupt_blob"
    path.unlink()
    with pytest.raises(SnapshotError, match=f"{GATE_UP}/3.*{manifest.blobs[key]}") as caught:
        read_state_dict(manifest, store)
    assert caught.value.reason == "missing_blob"


def test_fetch_resumes_and_skips_what_is_held(make_model, tmp_path):
    """A fetch copies missing blobs only, resumes where it broke off, and after a fold takes the changed expert."""
    model = make_model("mixtral")
    source, target = BlobStore(tmp_path / "source"), BlobStore(tmp_path / "target")
    manifest = _publish(model, "mixtral", source)
    hidden = Path(source.location(manifest.blobs[slice_key(GATE_UP, 3)]))
    hidden.rename(tmp_path / "aside")
    with pytest.raises(SnapshotError, match="slice .*gate_up_proj/3"):
        fetch(manifest, source, target)
    held = len(list(target.digests()))
    assert 0 < held < len(manifest.blobs)
    (tmp_path / "aside").rename(hidden)
    report = fetch(manifest, source, target)
    assert (report.blobs, report.skipped) == (len(manifest.blobs) + 1 - held, held)
    assert fetch(manifest, source, target).size_bytes == 0
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[3] *= 2
    newer = _publish(model, "mixtral", source)
    assert fetch(newer, source, target).blobs == 1
    assert torch.equal(build_model(newer, target)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_fetch_heals_a_damaged_disk(make_model, tmp_path):
    """With verify, a held blob that rotted is fetched again."""
    source, target = BlobStore(tmp_path / "source"), BlobStore(tmp_path / "target")
    manifest = _publish(make_model("mixtral"), "mixtral", source)
    fetch(manifest, source, target)
    Path(target.location(manifest.blobs["core/rest"])).write_bytes(b"rot")
    assert fetch(manifest, source, target).blobs == 0
    assert fetch(manifest, source, target, verify=True).blobs == 1
    read_state_dict(manifest, target)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": -1}, "version"),
        ({"version": True}, "version"),
        ({"family": "gpt2"}, "family"),
        ({"tokenizer": "abc"}, "tokenizer"),
        ({"model_config": {"model_type": "olmoe"}}, "model_config"),
        ({"blobs": {"core/../../etc": "0" * 64}}, "blobs"),
        ({"blobs": {f"{GATE_UP}/01": "0" * 64}}, "blobs"),
        ({"blobs": {"core/rest": "../secret"}}, "blobs"),
        ({"format": "fednested.snapshot/2"}, "format"),
        ({"extra": 1}, "exactly the fields"),
    ],
)
def test_manifest_is_strict(change, field):
    """A manifest from outside with a wrong, unknown or dangerous field is refused by name."""
    good = SnapshotManifest(
        version=0,
        family="mixtral",
        model_config={"model_type": "mixtral"},
        tokenizer="0" * 64,
        blobs={"core/rest": "1" * 64},
    )
    assert SnapshotManifest.from_json(good.to_json()) == good
    document = json.dumps({**json.loads(good.to_json()), **change}, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(SnapshotError, match=field):
        SnapshotManifest.from_json(document)
    with pytest.raises(SnapshotError, match="canonical"):
        SnapshotManifest.from_json(good.to_json() + b" ")
    with pytest.raises(SnapshotError, match="not JSON"):
        SnapshotManifest.from_json(b"[" * 100_000)


def test_slices_must_match_the_config(make_model, tmp_path):
    """A snapshot that lacks an expert, has one too many, or holds a slice of another shape is refused by slice."""
    store = BlobStore(tmp_path)
    manifest = _publish(make_model("mixtral"), "mixtral", store)
    fewer = {key: digest for key, digest in manifest.blobs.items() if key != slice_key(GATE_UP, 5)}
    more = {**manifest.blobs, slice_key(GATE_UP, 6): manifest.blobs[slice_key(GATE_UP, 5)]}
    odd = {**manifest.blobs, slice_key(GATE_UP, 5): store.put(encode_blob({"weight": np.zeros((2, 2), np.float32)}))}
    core = {**manifest.blobs, "core/rest": manifest.blobs["core/layers.0"]}
    for blobs, named in (
        (fewer, f"{GATE_UP}/5"),
        (more, f"{GATE_UP}/6"),
        (odd, f"{GATE_UP}/5"),
        (core, "lm_head.weight"),
    ):
        with pytest.raises(SnapshotError, match=named):
            build_model(dataclasses.replace(manifest, blobs=blobs), store)


def test_unnamed_parameter_is_never_written(make_model, tmp_path):
    """A state dict with a parameter that no rule names is not published."""
    state = {**make_model("mixtral").state_dict(), "model.layers.0.mlp.shared_expert.weight": torch.zeros(2)}
    with pytest.raises(PartitionError):
        write_state_dict(state, "mixtral", BlobStore(tmp_path))


def test_half_precision_is_widened_exactly(make_model, tmp_path):
    """bf16 weights become fp32 masters without a change of value, so their digest is that of the same fp32 weights."""
    store, model = BlobStore(tmp_path), make_model("mixtral").to(torch.bfloat16)
    blobs = write_state_dict(model.state_dict(), "mixtral", store)
    assert blobs == write_state_dict(model.float().state_dict(), "mixtral", store)


def test_blob_bytes_do_not_depend_on_order():
    """Equal arrays give equal bytes whatever the order of names, and come back equal."""
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32)
    data = encode_blob({"a": a, "b": b})
    assert data == encode_blob({"b": b, "a": np.asfortranarray(a)})
    assert np.array_equal(decode_blob(data)["a"], a)
    with pytest.raises(SnapshotError, match="safetensors"):
        decode_blob(data[:-1])


def test_manifest_and_fetch_need_no_torch():
    """A gateway mirrors snapshots without torch or transformers installed."""
    program = (
        "import sys; import fednested_lib.snapshot, fednested_lib.partition, fednested_lib.text;"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ChainCorrupt, ChainError, LogError, SnapshotError
from fednested_lib.log import TOPICS, InMemoryLog
from fednested_lib.signing import canonical_json
from fednested_lib.snapshot import SLICE_TENSOR, decode_blob, encode_blob, expert_of
from tests.tier1.versions.scene import COMMITTER, LOCAL, Scene, device_key, gate_record
from tier1.versions import build
from tier1.versions import replay as replay_module
from tier1.versions.build import refold
from tier1.versions.manifest import NumericProfile
from tier1.versions.replay import replay, verify_archive, verify_blobs, verify_log
from tier1.versions.settings import Rates


@pytest.fixture(scope="module")
def history(tmp_path_factory) -> Scene:
    """Two folds, a core update, version 2 rejected by a person, version 3 folded again, an automatic rejection."""
    scene = Scene(tmp_path_factory.mktemp("history"))
    scene.genesis()
    for client in scene.clients:
        scene.send(client, 0)
    scene.advance()
    scene.send("bob", 1)
    scene.send("eve", 0)
    scene.advance()
    scene.settle(scene.fold(scene.dense("run-1")))
    scene.decide("reject", 2)
    pending = scene.chain.state().pending[0].entry.body.candidate
    scene.settle(refold(pending, scene.chain.state(), Rates(), blobs=scene.blobs, archive=scene.archive))
    scene.send("cat", 1)
    scene.settle(scene.fold(scene.cut()), gate=lambda candidate: gate_record(candidate, False), max_tries=2)
    return scene


@pytest.fixture
def scene(history, tmp_path) -> Scene:
    """A copy of the history whose blobs are moved away: only genesis's are left, in another store."""
    home = tmp_path / "home"
    shutil.copytree(history.home, home)
    copy = Scene(home, log=history.log)
    genesis = BlobStore(home / "genesis")
    view = copy.chain.state().versions[0]
    for digest in (*view.blobs.values(), view.tokenizer):
        genesis.put(copy.blobs.get(digest))
    shutil.move(home / "blobs", home / "moved-away")
    copy.genesis_blobs, copy.originals, copy.rebuilt = genesis, BlobStore(home / "moved-away"), BlobStore(home / "new")
    return copy


def rebuild(scene: Scene, versions=None, **arguments):
    return list(
        replay(
            scene.chain,
            versions,
            archive=scene.archive,
            genesis=scene.genesis_blobs,
            target=scene.rebuilt,
            **{"devices": scene.devices, **arguments},
        )
    )


def flip(path: str | Path, position: int = 20) -> None:
    data = bytearray(Path(path).read_bytes())
    data[position % len(data)] ^= 1
    Path(path).write_bytes(bytes(data))


def body_of(scene: Scene, version: int):
    return scene.chain.entries()[scene.chain.state().versions[version].seq].entry.body


def test_every_version_is_rebuilt_to_the_same_digests(scene):
    """With every blob but genesis's moved away, all versions, voided ones included, come back bit by bit."""
    results = rebuild(scene)
    assert [(result.version, result.verdict) for result in results] == [(v, "identical") for v in range(5)]
    assert [result.n_folded for result in results] == [0, 16, 16, 3, 3]
    for view in scene.chain.state().versions.values():
        assert all(scene.rebuilt.has(digest) for digest in view.blobs.values())


def test_one_version_needs_its_lineage_only(scene):
    """Asking for version 4 rebuilds 0, 1 and 4 and reports 4; what the voided ones made is not there."""
    assert [result.version for result in rebuild(scene, [4])] == [4]
    voided = set(scene.chain.state().versions[2].blobs.values()) - set(scene.chain.state().versions[1].blobs.values())
    assert not any(scene.rebuilt.has(digest) for digest in voided)


def test_unknown_version_names_the_range(scene):
    """Asking for a version that does not exist is one line."""
    with pytest.raises(ChainError, match=r"version must be one of 0\.\.4, got 9"):
        rebuild(scene, [9])


def test_altered_genesis_blob_is_named(scene):
    """One changed byte in a blob of genesis names slice and digest."""
    key, digest = next((k, d) for k, d in scene.chain.state().versions[0].blobs.items() if expert_of(k))
    flip(scene.genesis_blobs.location(digest))
    with pytest.raises(SnapshotError, match=f"slice {key} of version 0: blob {digest}"):
        rebuild(scene)


@pytest.mark.parametrize("part", ["envelope_sha256", "payload_sha256"])
@pytest.mark.parametrize("position", [0, 77, -1])
def test_altered_envelope_or_payload_is_named(scene, part, position):
    """One changed byte anywhere in an archived envelope or payload names entry, update and blob."""
    rows = body_of(scene, 1).candidate.accepted
    digest = getattr(rows[2], part)
    accepted = next(row for row in rows if getattr(row, part) == digest)  # two may have sent the same payload
    flip(scene.archive.location(digest), position)
    name = part.split("_")[0]
    with pytest.raises(ChainCorrupt, match=f"000001.json: {name} of update {accepted.update_id[:12]}.*{digest}"):
        rebuild(scene)
    with pytest.raises(ChainCorrupt, match=digest):
        verify_archive(scene.chain, scene.archive)


def test_missing_payload_is_named(scene):
    """An archived payload that is gone names entry, update and blob."""
    digest = body_of(scene, 1).candidate.accepted[0].payload_sha256
    Path(scene.archive.location(digest)).unlink()
    with pytest.raises(ChainCorrupt, match=f"000001.json: payload of update .*blob {digest} is missing"):
        rebuild(scene)


def test_altered_dense_slice_is_named(scene):
    """One changed byte in a slice of a core update's delta names entry and blob."""
    digest = body_of(scene, 3).candidate.inputs.dense.blobs["core/rest"]
    flip(scene.archive.location(digest))
    with pytest.raises(ChainCorrupt, match=f"000003.json.*{digest}"):
        rebuild(scene)


def test_altered_archive_of_a_rejection_is_named(scene):
    """Inputs that were never folded are evidence too."""
    rejection = scene.chain.entries()[-1].entry.body
    assert rejection.kind == "rejection"
    flip(scene.archive.location(rejection.candidate.accepted[0].payload_sha256))
    with pytest.raises(ChainCorrupt, match="rejection entry 000006.json"):
        verify_archive(scene.chain, scene.archive)


def rewrite(scene: Scene, seq: int, change) -> None:
    """Change the body of entry `seq` and sign it with the committer's own key; entries after it are cut off."""
    path, *later = sorted((scene.home / "chain").glob("*.json"))[seq:]
    document = json.loads(path.read_bytes())
    change(document["body"])
    document.pop("signature")
    document["signature"] = COMMITTER.sign(canonical_json(document))
    path.write_bytes(canonical_json(document))
    for one in later:
        one.unlink()


def test_manifest_that_lies_about_a_blob_is_found(scene):
    """A validly signed manifest with another blob than F gives: `differs`, and the slice is named."""
    other = scene.originals.put(encode_blob({SLICE_TENSOR: np.zeros((20, 12), np.float32)}))
    key = "model.layers.0.mlp.experts.gate_up_proj/1"
    rewrite(scene, 1, lambda body: body["candidate"]["blobs"].update({key: other}))
    result = rebuild(scene)[1]
    assert (result.verdict, result.where) == ("differs", key)


def test_manifest_that_lies_about_a_weight_is_found(scene):
    """A validly signed manifest that records another weight than F gives is found and the update named."""
    rewrite(scene, 1, lambda body: body["candidate"]["accepted"][1].update({"weight": 0.9}))
    result = rebuild(scene)[1]
    assert result.verdict == "differs"
    assert "accepted update" in result.where


def test_update_under_another_device_key_is_found(scene):
    """An accepted update must carry the registered key of its device, and a signature by it."""
    accepted = body_of(scene, 1).candidate.accepted[0]
    registered = {accepted.client_id: scene.devices["dan" if accepted.client_id != "dan" else "ada"]}
    with pytest.raises(ChainCorrupt, match=f"registered key of {accepted.client_id}"):
        rebuild(scene, devices=registered)
    key = device_key("mallory").public_key
    rewrite(scene, 1, lambda body: body["candidate"]["accepted"][0].update({"public_key": key}))
    with pytest.raises(ChainCorrupt, match="000001.json: envelope of update .* unsigned or altered"):
        rebuild(scene, devices={})


def test_manifest_row_must_match_its_envelope(scene):
    """A row that tells another sequence number than the signed envelope is found."""
    rewrite(scene, 1, lambda body: body["candidate"]["accepted"][0].update({"sequence": 41}))
    with pytest.raises(ChainCorrupt, match="has sequence 0, its manifest says 41"):
        rebuild(scene)


def test_altered_chain_stops_replay(scene):
    """One changed byte in any manifest stops the replay and names the file, the last one included."""
    for path in sorted((scene.home / "chain").glob("*.json")):
        data = path.read_bytes()
        flip(path, len(data) // 2)
        with pytest.raises(ChainCorrupt, match=path.name):
            rebuild(scene)
        path.write_bytes(data)


def another_profile(monkeypatch) -> None:
    profile = NumericProfile(torch="9.9", instruction_set="other")
    monkeypatch.setattr(replay_module, "numeric_profile", lambda: profile)


def perturbed_fold(monkeypatch, size: float) -> None:
    """Make the fold round differently, as another machine may."""
    original = build.fold_experts

    def fold(blobs, updates, *, eta, store):
        folded = original(blobs, updates, eta=eta, store=store)
        for key in folded:
            if folded[key] != blobs[key]:
                matrix = decode_blob(store.get(folded[key]))[SLICE_TENSOR]
                folded[key] = store.put(encode_blob({SLICE_TENSOR: matrix + np.float32(size) * np.abs(matrix).max()}))
        return folded

    monkeypatch.setattr(build, "fold_experts", fold)


def test_other_profile_is_equivalent_not_identical(scene, monkeypatch):
    """On another numeric profile small differences are measured against the originals and reported."""
    another_profile(monkeypatch)
    perturbed_fold(monkeypatch, 1e-6)
    results = rebuild(scene, [1, 4], originals=scene.originals)
    assert [result.verdict for result in results] == ["equivalent", "equivalent"]
    assert 0 < results[0].largest_difference < 1e-5


def test_other_profile_with_large_differences_differs(scene, monkeypatch):
    """Another profile excuses rounding, not other weights."""
    another_profile(monkeypatch)
    perturbed_fold(monkeypatch, 1e-2)
    (result,) = rebuild(scene, [1], originals=scene.originals)
    assert result.verdict == "differs"
    assert result.largest_difference > 1e-3


def test_same_profile_forgives_nothing(scene, monkeypatch):
    """On the recorded profile a difference in the last bits is a difference."""
    perturbed_fold(monkeypatch, 1e-6)
    (result,) = rebuild(scene, [1], originals=scene.originals)
    assert result.verdict == "differs"
    assert result.where is not None


def test_other_code_is_equivalent_not_tampering(scene, monkeypatch):
    """An upgrade may round differently: small differences are measured, a row that says something else is named."""
    monkeypatch.setattr(build, "code_version", lambda: "9.9+another")
    perturbed_fold(monkeypatch, 1e-6)
    assert [result.verdict for result in rebuild(scene, [1, 4], originals=scene.originals)] == ["equivalent"] * 2


@pytest.mark.parametrize(("factor", "verdict"), [(1 + 1e-12, "identical"), (1.01, "differs")])
def test_other_code_forgives_rounding_of_rows_alone(scene, monkeypatch, factor, verdict):
    """With other code a recorded norm may differ in its last digits, and in no more."""
    original = build.magnitude
    monkeypatch.setattr(build, "code_version", lambda: "9.9+another")
    monkeypatch.setattr(build, "magnitude", lambda *args: (factor * original(*args)[0], original(*args)[1]))
    (result,) = rebuild(scene, [1])
    assert result.verdict == verdict


def test_log_that_still_holds_the_cuts_is_the_same(scene):
    """Every cut of versions and rejections is read again; one whose records are gone by retention is `expired`."""
    checks = verify_log(scene.chain, scene.log)
    assert [check.status for check in checks] == ["same"] * 3
    expired = InMemoryLog(name="scene")
    expired.create_topics(TOPICS)
    for record in scene.log.read(LOCAL, scene.log.watermarks(LOCAL)):
        expired.append(LOCAL, key=record.key, value=record.value, headers=dict(record.headers))
    for partition in scene.log.watermarks(LOCAL):
        expired.delete_before(LOCAL, partition, 1)
    assert [check.status for check in verify_log(scene.chain, expired)] == ["expired", "same", "same"]


def test_altered_record_in_the_log_is_named(scene):
    """One changed byte in a consumed record names the cut's ranges and both digests."""
    copy = InMemoryLog(name="scene")
    copy.create_topics(TOPICS)
    for i, record in enumerate(scene.log.read(LOCAL, scene.log.watermarks(LOCAL))):
        value = record.value if i != 1 else record.value[:-1] + bytes([record.value[-1] ^ 1])
        copy.append(LOCAL, key=record.key, value=value, headers=dict(record.headers))
    with pytest.raises(LogError, match="the log was altered or re-used offsets"):
        verify_log(scene.chain, copy)


def test_altered_stored_blob_is_named(scene):
    """Every stored blob is read again; missing and altered ones are listed with version and slice."""
    state = scene.chain.state()
    assert verify_blobs(state, scene.originals) == []
    key = "model.layers.1.mlp.experts.down_proj/0"
    flip(scene.originals.location(state.versions[1].blobs[key]))
    Path(scene.originals.location(state.versions[3].blobs["core/rest"])).unlink()
    problems = verify_blobs(state, scene.originals)
    assert [(problem.version, problem.key) for problem in problems] == [(1, key), (3, "core/rest")]
    assert "corrupt" in problems[0].message
    assert "missing" in problems[1].message

"""The Fisher information of a version: what the log says and nothing else, through folds, rejection and replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ChainCorrupt, EnvelopeError, PayloadError
from fednested_lib.signing import canonical_json
from fednested_lib.snapshot import decode_blob, encode_blob
from tests.tier1.versions.scene import COMMITTER, Scene
from tier1.versions.dense_update import verify_dense
from tier1.versions.replay import replay, verify_archive, verify_blobs


@pytest.fixture
def scene(tmp_path) -> Scene:
    scene = Scene(tmp_path / "home")
    scene.genesis()
    return scene


def key_of(scene: Scene) -> str:
    """Return an expert's slice."""
    return next(key for key in scene.chain.state().head.blobs if not key.startswith("core/"))


def fisher(scene: Scene, seed: int, change=lambda array: array) -> dict[str, str]:
    """Archive Fisher information of every slice."""
    rng, blobs = np.random.default_rng(seed), scene.chain.state().head.blobs
    found = {}
    for key in sorted(blobs):
        shapes = {name: array.shape for name, array in decode_blob(scene.blobs.get(blobs[key])).items()}
        tensors = {name: change(rng.exponential(size=shape)).astype(np.float32) for name, shape in shapes.items()}
        found[key] = scene.archive.put(encode_blob(tensors))
    return found


def numbers(store: BlobStore, digests) -> dict[tuple[str, str], np.ndarray]:
    return {
        (key, name): array.astype(np.float64)
        for key, digest in digests.items()
        for name, array in decode_blob(store.get(digest)).items()
    }


def run(scene: Scene, name: str, seed: int, **fields):
    return scene.dense(name, seed=seed, fisher=fisher(scene, seed), **fields)


def test_a_version_carries_what_the_log_says_and_replay_gives_the_same_bytes(scene, tmp_path):
    """Guards F_{n+1} = d·F_n + F_run, that device folds and runs without EWC hand it on, and bit-equal replay."""
    first = run(scene, "r1", 1)
    scene.settle(scene.fold(first))
    one = scene.chain.state().head
    assert numbers(scene.blobs, one.fisher).keys() == numbers(scene.archive, first.fisher).keys()
    scene.send("bob", 0)
    scene.advance()
    scene.settle(scene.fold(scene.dense("plain", seed=8)))
    assert scene.chain.state().head.version == 3
    assert scene.chain.state().head.fisher == one.fisher
    second = run(scene, "r2", 2, fisher_decay=0.25)
    scene.settle(scene.fold(second))
    before, own = (numbers(scene.archive, update.fisher) for update in (first, second))
    for place, array in numbers(scene.blobs, scene.chain.state().head.fisher).items():
        np.testing.assert_array_equal(array, (0.25 * before[place] + own[place]).astype(np.float32))
    target = BlobStore(tmp_path / "new")
    arguments = {"archive": scene.archive, "genesis": scene.blobs, "target": target}
    assert [each.verdict for each in replay(scene.chain, None, **arguments)] == ["identical"] * 5
    assert all(target.has(digest) for view in (one, scene.chain.state().head) for digest in view.fisher.values())


def test_a_round_adds_the_runs_whatever_their_order(scene):
    """Guards several clusters: the sum of what each found, the parent's discounted once, by their mean decay."""
    scene.settle(scene.fold(run(scene, "r0", 1)))
    before = numbers(scene.blobs, scene.chain.state().head.fisher)
    updates = [run(scene, "a", 2, fisher_decay=0.2), run(scene, "b", 3, fisher_decay=0.6), scene.dense("c", seed=4)]
    candidate = scene.fold(updates)
    assert scene.fold(updates[::-1]).fisher == candidate.fisher
    own = [numbers(scene.archive, update.fisher) for update in updates[:2]]
    for place, array in numbers(scene.blobs, candidate.fisher).items():
        np.testing.assert_allclose(array, 0.4 * before[place] + own[0][place] + own[1][place], rtol=1e-6)


def test_a_rejected_version_takes_its_fisher_with_it(scene):
    """Guards that what a person rejects protects nothing: head has the Fisher of the version before."""
    scene.settle(scene.fold(run(scene, "r1", 1)))
    kept = scene.chain.state().head.fisher
    scene.settle(scene.fold(run(scene, "r2", 2)))
    assert scene.chain.state().head.fisher != kept
    scene.decide("reject", 2)
    assert scene.chain.state().head.fisher == kept


def test_an_altered_fisher_is_named_wherever_it_is_altered(scene, tmp_path):
    """Guards detection: the archived input, the stored sum, the signed update, and a manifest signed anew."""
    update = run(scene, "r1", 1)
    scene.settle(scene.fold(update))
    head = scene.chain.state().head
    forged = update.model_copy(update={"fisher": fisher(scene, 9)})
    with pytest.raises(EnvelopeError, match="bad_update_id|does not match the content"):
        verify_dense(forged, scene.chain.trusted)
    stored = Path(scene.blobs.location(head.fisher["core/rest"]))
    good = stored.read_bytes()
    stored.write_bytes(good[:-1] + b"x")
    assert [problem.key for problem in verify_blobs(scene.chain.state(), scene.blobs)] == ["fisher/core/rest"]
    stored.write_bytes(good)

    entry = sorted((scene.home / "chain").glob("*.json"))[-1]
    original = entry.read_bytes()
    document = scene.chain.entries()[-1].entry.model_dump(mode="json")
    document["body"]["candidate"]["fisher"]["core/rest"] = document["body"]["candidate"]["blobs"]["core/rest"]
    document.pop("signature")
    entry.write_bytes(canonical_json({**document, "signature": COMMITTER.sign(canonical_json(document))}))
    arguments = {"archive": scene.archive, "genesis": scene.blobs, "target": BlobStore(tmp_path / "new")}
    (result,) = replay(Scene(scene.home, log=scene.log).chain, [1], **arguments)
    assert (result.verdict, result.where) == ("differs", "fisher/core/rest")
    entry.write_bytes(original)

    digest = update.fisher["core/rest"]
    archived = Path(scene.archive.location(digest))
    archived.write_bytes(archived.read_bytes()[:-1] + b"x")
    with pytest.raises(ChainCorrupt, match=f"000001.json.*{digest}"):
        verify_archive(scene.chain, scene.archive)


def test_what_has_no_fisher_keeps_the_bytes_that_it_had(scene):
    """Guards chains and updates written before there was the field: neither document says anything of it."""
    update = scene.dense("plain")
    scene.settle(scene.fold(update))
    assert b"fisher" not in update.to_bytes()
    assert not any(b"fisher" in path.read_bytes() for path in (scene.home / "chain").glob("*.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda array: -array, r"must be in 0\.\.1e\+30"),
        (lambda array: array * np.nan, r"must be in 0\.\.1e\+30"),
        (lambda array: array * 0 + 3e38, r"must be in 0\.\.1e\+30"),
        (lambda array: array[:1], "other tensors or shapes"),
    ],
)
def test_a_fisher_that_is_none_is_refused(scene, change, said):
    """Guards the springs: a negative or endless stiffness, or one of another shape, makes no version."""
    with pytest.raises(PayloadError, match=said):
        scene.fold(scene.dense("bad", fisher=fisher(scene, 1, change)))


def test_a_fisher_of_no_slice_is_refused(scene):
    """Guards against a name that the model does not have."""
    whole = fisher(scene, 1)
    with pytest.raises(PayloadError, match="names slice 'core/none'"):
        scene.fold(scene.dense("bad", fisher={**whole, "core/none": whole["core/rest"]}))


def test_a_part_of_a_fisher_is_refused(scene):
    """Guards the chain: a version that carries a part cannot be read by the next run, and passes it on for ever."""
    whole = fisher(scene, 1)
    with pytest.raises(PayloadError, match=f"Fisher information lacks slice '{key_of(scene)}'"):
        scene.fold(scene.dense("bad", fisher={key: whole[key] for key in whole if key != key_of(scene)}))

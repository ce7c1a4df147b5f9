from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from fednested_lib.errors import ChainCorrupt, SnapshotError
from fednested_lib.snapshot import SLICE_TENSOR, decode_blob, expert_of
from tests.tier1.versions.scene import SHAPES, Scene, random_delta
from tier1.versions import build
from tier1.versions.build import fold_candidate, refold
from tier1.versions.manifest import Inputs
from tier1.versions.settings import Rates


def matrix(scene: Scene, blobs: dict[str, str], key: str) -> np.ndarray:
    return decode_blob(scene.blobs.get(blobs[key]))[SLICE_TENSOR]


def test_one_client_gives_its_own_delta(scene):
    """A fresh lone client with enough tokens moves its experts by exactly η·(α/r)·B·A, and nothing else."""
    delta = random_delta(7, experts=(1, 3), rank=3)
    scene.send("ada", 0, delta)
    parent = scene.chain.state().head
    candidate = scene.fold(scene.cut(), Rates(eta_t2=0.5))
    for name in SHAPES:
        factors = delta.factors[name]
        for i, expert in enumerate(factors.expert_ids):
            key = f"{name}/{expert}"
            step = 0.5 * delta.spec.scale * factors.lora_b[i] @ factors.lora_a[i]
            np.testing.assert_allclose(
                matrix(scene, candidate.blobs, key), matrix(scene, parent.blobs, key) + step, rtol=1e-6, atol=1e-7
            )
    changed = {key for key, digest in candidate.blobs.items() if digest != parent.blobs[key]}
    assert changed == {f"{name}/{expert}" for name in SHAPES for expert in (1, 3)}


def test_arrival_order_does_not_show_in_the_weights(tmp_path):
    """The same updates at other offsets give the same blobs; only the log positions in the manifest differ."""
    blobs = []
    for i, order in enumerate([("ada", "bob", "cat"), ("cat", "bob", "ada")]):
        scene = Scene(tmp_path / str(i), clients=("ada", "bob", "cat"))
        scene.genesis()
        for client in order:
            for sequence in (0, 1) if i else (1, 0):
                scene.send(client, sequence)
        candidate = scene.fold(scene.cut())
        blobs.append(candidate.blobs)
        assert len(candidate.accepted) == 6
    assert blobs[0] == blobs[1]


def test_same_bytes_in_same_bytes_out(scene):
    """Folding the same cut twice gives the same manifest, and permuting the admitted updates does too."""
    for client in scene.clients:
        scene.send(client, 0)
    cut = scene.cut()
    first = scene.fold(cut)
    assert scene.fold(cut).digest() == first.digest()
    admission = scene.admit(cut)
    backwards = type(admission)(updates=admission.updates[::-1], refused=())
    arguments = {"rates": Rates(), "settings": scene.settings, "blobs": scene.blobs, "archive": scene.archive}
    again = fold_candidate(
        scene.chain.state().head, Inputs(cut=cut), backwards, trainer="trainer", authorisation="policy-1", **arguments
    )
    assert again.digest() == first.digest()


def test_manifest_tells_weights_and_refusals(scene):
    """The candidate names every accepted update with norm, clip, weight and staleness, and every refused one."""
    base = scene.chain.state().head
    scene.send("bob", 0)
    scene.advance()
    scene.send("ada", 0, random_delta(1, size=2.0), base=base)
    scene.send("eve", 0)
    candidate = scene.fold(scene.cut())
    (ada,) = candidate.accepted
    assert (ada.client_id, ada.staleness, ada.experts, ada.tokens) == ("ada", 1, 8, 1024)
    assert ada.norm > scene.settings.max_norm
    assert ada.clip * ada.norm == pytest.approx(scene.settings.max_norm)
    assert ada.weight == pytest.approx(ada.clip * 2**-0.5)
    assert [(record.client_id, record.reason) for record in candidate.refused] == [("eve", "unknown_client")]
    assert candidate.parent == scene.chain.state().head.digest
    assert candidate.profile.threads == 1


def test_eta_zero_keeps_the_parents_weights(scene):
    """η = 0 gives the parent's blobs for a cut and for a dense update."""
    parent = scene.chain.state().head
    scene.send("ada", 0)
    assert scene.fold(scene.cut(), Rates(eta_t2=0.0)).blobs == parent.blobs
    assert scene.fold(scene.dense("run-1"), Rates(eta_core=0.0, eta_t1=0.0)).blobs == parent.blobs


def test_dense_update_folds_into_a_newer_head(scene):
    """A core update that took two folds lands on the head of now, and moves core shards and its expert only."""
    dense = scene.dense("run-1")
    for sequence in range(2):
        scene.send("ada", sequence, random_delta(sequence, experts=(2,)))
        scene.advance()
    parent = scene.chain.state().head
    candidate = scene.fold(dense)
    assert (candidate.parent_version, candidate.inputs.dense.base_version) == (2, 0)
    changed = {key for key, digest in candidate.blobs.items() if digest != parent.blobs[key]}
    assert changed == set(dense.blobs)
    assert {key for key in changed if expert_of(key) is None} == {"core/rest", "core/layers.1"}


def test_refold_with_the_same_rates_and_head_is_the_same_candidate(scene):
    """The archive holds all that the first fold had."""
    for client in scene.clients:
        scene.send(client, 0)
    candidate = scene.fold(scene.cut())
    again = refold(candidate, scene.chain.state(), Rates(), blobs=scene.blobs, archive=scene.archive)
    assert again == candidate


def test_refold_halves_the_step(scene):
    """Halved η halves the step of every expert."""
    scene.send("ada", 0)
    parent = scene.chain.state().head
    full = scene.fold(scene.cut())
    half = refold(full, scene.chain.state(), full.rates.halved(), blobs=scene.blobs, archive=scene.archive)
    for key in (f"{name}/0" for name in SHAPES):
        before = matrix(scene, parent.blobs, key)
        np.testing.assert_allclose(
            matrix(scene, full.blobs, key) - before, 2 * (matrix(scene, half.blobs, key) - before), atol=1e-6
        )


def test_refold_judges_staleness_and_duplicates_for_the_new_head(scene):
    """On another head the weights follow the new staleness, and what is too stale or seen meanwhile is refused."""
    base = scene.chain.state().head
    scene.send("ada", 0, base=base)
    candidate = scene.fold(scene.cut())
    fold = partial(refold, candidate, blobs=scene.blobs, archive=scene.archive)
    for i in range(scene.settings.max_staleness + 1):
        scene.settle(scene.fold(scene.dense(f"run-{i}", seed=i)))
        again = fold(scene.chain.state(), Rates())
        assert again.parent_version == i + 1
        if i < scene.settings.max_staleness:
            assert [update.staleness for update in again.accepted] == [i + 1]
            assert again.accepted[0].weight == pytest.approx((i + 2) ** -0.5)
    assert (again.accepted, [record.reason for record in again.refused]) == ([], ["too_stale"])


@pytest.mark.parametrize("part", ["envelope", "payload"])
def test_altered_archive_is_named(scene, part):
    """One changed byte in an archived envelope or payload stops the fold and names update, client and digest."""
    scene.send("ada", 0)
    candidate = scene.fold(scene.cut())
    digest = getattr(candidate.accepted[0], f"{part}_sha256")
    with open(scene.archive.location(digest), "r+b") as file:
        file.seek(5)
        file.write(b"\x00")
    with pytest.raises(ChainCorrupt, match=f"{part} of update .* of ada .*{digest}.*corrupt"):
        refold(candidate, scene.chain.state(), Rates(), blobs=scene.blobs, archive=scene.archive)


def test_corrupt_parent_blob_stops_the_fold(scene):
    """A parent's blob that was altered is named with its slice."""
    scene.send("ada", 0)
    key = f"{next(iter(SHAPES))}/2"
    with open(scene.blobs.location(scene.chain.state().head.blobs[key]), "r+b") as file:
        file.write(b"?")
    with pytest.raises(SnapshotError, match=f"slice {key}"):
        scene.fold(scene.cut())


def test_code_version_names_release_and_sources():
    """The version of F is the release and a digest over the sources it consists of."""
    release, digest = build.code_version().split("+")
    assert release == build.fednested_lib.__version__
    assert len(digest) == 12

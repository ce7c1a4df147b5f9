from __future__ import annotations

import numpy as np
import pytest

from fednested_lib.snapshot import SLICE_TENSOR, decode_blob
from tests.tier1.versions.scene import SETTINGS, Scene, random_delta
from tier1.versions.build import refold
from tier1.versions.settings import OuterSettings, Rates

KINDS = ("momentum", "nesterov", "adam")
KEY = "model.layers.1.mlp.experts.down_proj/2"


@pytest.fixture(params=KINDS)
def scene(request, tmp_path) -> Scene:
    """A federation whose folds pass through an outer optimiser."""
    outer = OuterSettings(kind=request.param, beta=0.8, beta2=0.9)
    scene = Scene(tmp_path, settings=SETTINGS.model_copy(update={"outer": outer}))
    scene.genesis()
    return scene


def matrix(scene: Scene, digest: str) -> np.ndarray:
    return decode_blob(scene.blobs.get(digest))[SLICE_TENSOR].astype(np.float64)


def reference(kind: str, deltas: list[np.ndarray], beta=0.8, beta2=0.9, epsilon=1e-8) -> list[np.ndarray]:
    """Return the moves, as the papers write them."""
    betas = np.broadcast_to(beta, len(deltas))
    m, v, moves = 0.0, 0.0, []
    for t, (delta, beta) in enumerate(zip(deltas, betas, strict=True), 1):
        if kind == "adam":
            m, v = beta * m + (1 - beta) * delta, beta2 * v + (1 - beta2) * delta**2
            moves.append(m / (1 - beta**t) / (np.sqrt(v / (1 - beta2**t)) + epsilon))
        else:
            m = beta * m + delta
            moves.append(m if kind == "momentum" else delta + beta * m)
    return moves


def dense(delta) -> np.ndarray:
    name, expert = KEY.rsplit("/", 1)
    factors = delta.factors[name]
    i = factors.expert_ids.index(int(expert))
    return delta.spec.scale * factors.lora_b[i].astype(np.float64) @ factors.lora_a[i].astype(np.float64)


def test_three_folds_follow_the_paper(scene):
    """Weights move as momentum, Nesterov and Adam say, with η, from state that the chain carries."""
    deltas, before = [random_delta(seed) for seed in range(3)], scene.chain.state().head
    moves = reference(scene.settings.outer.kind, [dense(delta) for delta in deltas])
    for sequence, (delta, move) in enumerate(zip(deltas, moves, strict=True)):
        scene.send("ada", sequence, delta)
        scene.settle(scene.fold(scene.cut(), Rates(eta_t2=0.5)))
        after = scene.chain.state().head
        found = matrix(scene, after.blobs[KEY]) - matrix(scene, before.blobs[KEY])
        np.testing.assert_allclose(found, 0.5 * move, rtol=1e-5, atol=5e-7)
        before = after


@pytest.mark.parametrize("scene", ["momentum", "nesterov"], indirect=True)
def test_beta_warms_up_with_the_steps_of_a_slice(scene):
    """With a warm-up of two steps the first move is Δ alone, the second has half of β, the third all of it."""
    scene.settings = scene.settings.model_copy(update={"outer": scene.settings.outer.model_copy(update={"warmup": 2})})
    deltas, before = [random_delta(seed) for seed in range(4)], scene.chain.state().head
    moves = reference(scene.settings.outer.kind, [dense(delta) for delta in deltas], beta=[0.0, 0.4, 0.8, 0.8])
    for sequence, (delta, move) in enumerate(zip(deltas, moves, strict=True)):
        scene.send("ada", sequence, delta)
        scene.settle(scene.fold(scene.cut()))
        after = scene.chain.state().head
        found = matrix(scene, after.blobs[KEY]) - matrix(scene, before.blobs[KEY])
        np.testing.assert_allclose(found, move, rtol=1e-5, atol=5e-7)
        before = after


def test_settings_without_a_warm_up_keep_the_bytes_that_chains_were_signed_with():
    """A new key must not change the digest of an old manifest; with Adam, which corrects itself, it is refused."""
    assert b"warmup" not in OuterSettings(kind="nesterov").to_bytes()
    assert OuterSettings.model_validate_json(OuterSettings(warmup=3).to_bytes()).warmup == 3
    with pytest.raises(ValueError, match="warmup must be 0 with adam"):
        OuterSettings(kind="adam", warmup=1)


def test_untouched_expert_keeps_weights_and_state(scene):
    """An expert that no update covers keeps the digests of weights and state; so does everything at η = 0."""
    scene.send("ada", 0)
    scene.advance()
    before = scene.chain.state().head
    scene.send("bob", 0, random_delta(1, experts=(0, 2)))
    cut = scene.cut()
    still = scene.fold(cut, Rates(eta_t2=0.0))
    assert (still.blobs, still.outer) == (before.blobs, before.outer)
    after = scene.fold(cut)
    for key, digest in before.outer.items():
        touched = int(key.rsplit("/", 1)[1]) in (0, 2)
        assert (after.outer[key] != digest) == touched
        assert (after.blobs[key] != before.blobs[key]) == touched


def test_core_update_leaves_the_state_alone(scene):
    """A dense delta is no step of the outer optimiser."""
    scene.send("ada", 0)
    scene.advance()
    before = scene.chain.state().head
    assert before.outer
    assert scene.fold(scene.dense("run-1")).outer == before.outer


def test_refold_starts_from_the_parents_state(scene):
    """A second fold of the same inputs is the same candidate, and halved η changes weights but no state."""
    scene.send("ada", 0)
    scene.advance()
    scene.send("bob", 0)
    first = scene.fold(scene.cut())
    again = refold(first, scene.chain.state(), first.rates, blobs=scene.blobs, archive=scene.archive)
    half = refold(first, scene.chain.state(), first.rates.halved(), blobs=scene.blobs, archive=scene.archive)
    assert again == first
    assert half.outer == first.outer
    assert half.blobs != first.blobs


def test_another_kind_starts_from_zero(scene):
    """State of another optimiser is put aside: the next step is the first step of the new kind."""
    scene.send("ada", 0)
    scene.advance()
    kind = "adam" if scene.settings.outer.kind != "adam" else "momentum"
    scene.settings = scene.settings.model_copy(update={"outer": OuterSettings(kind=kind, beta=0.8, beta2=0.9)})
    before, delta = scene.chain.state().head, random_delta(9)
    scene.send("ada", 1, delta)
    after = scene.fold(scene.cut())
    (move,) = reference(kind, [dense(delta)])
    found = matrix(scene, after.blobs[KEY]) - matrix(scene, before.blobs[KEY])
    np.testing.assert_allclose(found, move, rtol=1e-4, atol=5e-7)

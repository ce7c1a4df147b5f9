from __future__ import annotations

import itertools

import numpy as np
import pytest

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ChainConflict, ChainCorrupt
from fednested_lib.snapshot import SLICE_TENSOR, decode_blob, slice_key
from tests.tier1.versions.scene import SETTINGS, SHAPES, Scene, gate_record, random_delta
from tier1.versions.build import refold
from tier1.versions.manifest import Inputs
from tier1.versions.replay import replay
from tier1.versions.settings import OuterSettings, Rates

EXPERT = slice_key(next(iter(SHAPES)), 1)
MOVED = {"core/rest": "core/rest.w", "core/layers.1": "core/layers.1.w", EXPERT: SLICE_TENSOR}
BETA = 0.8


@pytest.fixture
def scene(tmp_path) -> Scene:
    """A federation whose core updates pass through Nesterov."""
    outer = OuterSettings(kind="nesterov", beta=BETA)
    scene = Scene(tmp_path, settings=SETTINGS.model_copy(update={"core_outer": outer}))
    scene.genesis()
    return scene


def slices(store: BlobStore, blobs) -> dict[str, np.ndarray]:
    return {key: decode_blob(store.get(blobs[key]))[name].astype(np.float64) for key, name in MOVED.items()}


def core_state(view) -> dict[str, str]:
    return {key: digest for key, digest in view.outer.items() if key.startswith("tier1/")}


def test_one_cluster_without_momentum_is_the_plain_core_update(scene):
    """With β = 0 and η = 1 the optimiser changes no bit of any slice."""
    dense = scene.dense("run-1")
    scene.settings = scene.settings.model_copy(update={"core_outer": OuterSettings(kind="nesterov", beta=0.0)})
    stepped = scene.fold(dense)
    scene.settings = scene.settings.model_copy(update={"core_outer": None})
    assert stepped.blobs == scene.fold(dense).blobs != scene.chain.state().head.blobs


def test_two_clusters_over_three_rounds_follow_the_paper(scene):
    """W moves by η·(Δ + β·m), m ← β·m + Δ, Δ the mean over the clusters, from state that the chain carries."""
    momentum = dict.fromkeys(MOVED, 0.0)
    for number in range(3):
        before = scene.chain.state().head
        runs = [scene.dense(f"{cluster}-{number}", seed=10 * number + cluster) for cluster in range(2)]
        scene.settle(scene.fold(runs, Rates(eta_core=0.7, eta_t1=0.5)))
        deltas = [slices(scene.archive, run.blobs) for run in runs]
        old, new = (slices(scene.blobs, view.blobs) for view in (before, scene.chain.state().head))
        for key in MOVED:
            mean = (deltas[0][key] + deltas[1][key]) / 2
            momentum[key] = BETA * momentum[key] + mean
            eta = 0.5 if key == EXPERT else 0.7
            np.testing.assert_allclose(new[key] - old[key], eta * (mean + BETA * momentum[key]), rtol=1e-4, atol=1e-6)


def test_order_of_clusters_changes_no_bit(scene):
    """Every permutation of three clusters gives the same candidate."""
    runs = [scene.dense(f"run-{cluster}", seed=cluster) for cluster in range(3)]
    assert len({scene.fold(list(order)).digest() for order in itertools.permutations(runs)}) == 1


def test_untouched_slices_keep_weights_and_state(scene):
    """What no cluster moved, or η = 0 holds still, keeps its digests; the two tiers' states do not meet."""
    scene.settle(scene.fold([scene.dense("a", seed=1), scene.dense("b", seed=2)]))
    before = scene.chain.state().head
    assert {key.removeprefix("tier1/") for key in core_state(before)} == set(MOVED)
    still = scene.fold(scene.dense("c", seed=3), Rates(eta_t1=0.0))
    assert still.blobs[EXPERT] == before.blobs[EXPERT]
    assert still.outer[f"tier1/{EXPERT}"] == before.outer[f"tier1/{EXPERT}"]
    assert still.outer["tier1/core/rest"] != before.outer["tier1/core/rest"]
    untouched = [key for key in before.blobs if key not in MOVED]
    assert all(still.blobs[key] == before.blobs[key] for key in untouched)
    scene.settings = scene.settings.model_copy(update={"outer": OuterSettings()})
    scene.send("ada", 0)
    scene.advance()
    after = scene.chain.state().head
    assert core_state(after) == core_state(before)
    assert EXPERT in after.outer


def test_late_cluster_counts_less_and_is_folded_once(scene):
    """A delta whose base is one round older counts 2^−½; one that was part of a round is never folded again."""
    early, late = scene.dense("early", seed=1), scene.dense("late", seed=2)
    scene.settle(scene.fold(early))
    scene.send("ada", 0)
    scene.advance()  # a device fold is no round: the late one has missed one, not two
    before = scene.chain.state().head
    scene.settings = scene.settings.model_copy(update={"core_outer": OuterSettings(kind="nesterov", beta=0.0)})
    scene.settle(scene.fold(late))
    old, new = (slices(scene.blobs, view.blobs) for view in (before, scene.chain.state().head))
    delta = slices(scene.archive, late.blobs)
    for key in MOVED:
        np.testing.assert_allclose(new[key] - old[key], delta[key] / np.sqrt(2), rtol=1e-4, atol=1e-6)


def test_no_part_of_a_round_is_consumed_twice(scene):
    """A second round with a part of the first is a conflict for the committer; alone the part is settled already."""
    runs = [scene.dense(f"run-{cluster}", seed=cluster) for cluster in range(3)]
    scene.settle(scene.fold(runs[:2]))
    with pytest.raises(ChainConflict, match="part of this round"):
        scene.settle(scene.fold(runs[1:]))
    again = scene.fold(runs[0])
    assert scene.settle(again).outcome == "already"
    state = scene.chain.state()
    body = scene.chain.entries()[-1].entry.body
    forged = body.model_copy(update={"version": 2, "candidate": scene.fold(runs[1:])})
    with pytest.raises(ChainCorrupt, match="again"):
        scene.chain.append(forged, state.next_seq)


def test_part_of_a_voided_round_waits_for_its_round(scene):
    """When an older head is rejected, the round on it is folded again whole, and its parts stay spent."""
    scene.settle(scene.fold(scene.dense("first")))
    runs = [scene.dense(f"run-{cluster}", seed=cluster) for cluster in range(2)]
    settled = scene.settle(scene.fold(runs))
    scene.decide("reject", 1)
    state = scene.chain.state()
    assert (state.head.version, len(state.pending)) == (0, 1)
    assert all(Inputs(dense=run).id() in state.spent for run in runs)
    again = refold(settled.candidate, state, settled.candidate.rates, blobs=scene.blobs, archive=scene.archive)
    assert scene.settle(again).outcome == "advanced"
    assert scene.chain.state().pending == ()


def test_round_replays_identically_with_halved_eta_on_the_way(scene, tmp_path):
    """Versions of rounds and cuts, one after a failed gate, are rebuilt to the bit, optimiser state included."""
    failures = iter([False, True])
    scene.settle(scene.fold([scene.dense("a", seed=1), scene.dense("b", seed=2)]))
    scene.settle(
        scene.fold([scene.dense("c", seed=3), scene.dense("d", seed=4)]),
        gate=lambda candidate: gate_record(candidate, next(failures)),
    )
    assert scene.chain.state().head.version == 2
    assert scene.chain.entries()[-1].entry.body.candidate.rates == Rates().halved()
    scene.send("ada", 0, random_delta(0))
    scene.advance()
    replayed = replay(scene.chain, archive=scene.archive, genesis=scene.blobs, target=BlobStore(tmp_path / "rebuilt"))
    assert [result.verdict for result in replayed] == ["identical"] * 4


def test_lost_race_folds_the_round_on_the_new_head(scene):
    """A device fold that was first is kept; the round is folded on it, its momentum from there."""
    candidate = scene.fold([scene.dense("a", seed=1), scene.dense("b", seed=2)])
    scene.send("ada", 0)
    scene.advance()
    settled = scene.settle(candidate)
    body = settled.sealed.entry.body
    assert ([one.outcome for one in body.tries], body.version) == (["lost_race", "passed"], 2)
    assert core_state(scene.chain.state().head)

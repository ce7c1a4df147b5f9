from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ConfigError, SnapshotError
from fednested_lib.snapshot import SLICE_TENSOR, decode_blob, expert_of
from tests.federation import Device, make_federation, make_workspace
from tests.tier1.versions.scene import SETTINGS, Scene, gate_record, random_delta
from tier1.aggregation.orthogonal import leading, project, protection
from tier1.config import load_tier1
from tier1.loops import aggregate_sharded
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.evaluate_and_promote import settle_candidate
from tier1.loops.genesis import ensure_genesis
from tier1.versions.build import refold
from tier1.versions.replay import replay
from tier1.versions.settings import AggregationSettings, OrthogonalSettings, OuterSettings, Rates

KEY = "model.layers.1.mlp.experts.down_proj/2"
ON = OrthogonalSettings(versions=2, rank=3)


def make_scene(home: Path, **settings: object) -> Scene:
    """Two folds of two devices, without protection; what comes after has the settings given."""
    scene = Scene(home, settings=SETTINGS)
    scene.genesis()
    for sequence in range(2):
        for client in ("ada", "bob"):
            scene.send(client, sequence)
        scene.advance()
    scene.settings = SETTINGS.model_copy(update={"orthogonal": ON, **settings})
    return scene


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return make_scene(tmp_path)


def matrix(scene: Scene, digest: str) -> np.ndarray:
    return decode_blob(scene.blobs.get(digest))[SLICE_TENSOR].astype(np.float64)


def basis(scene: Scene, key: str = KEY) -> np.ndarray:
    """Return Q of the settings on head."""
    return protection(scene.chain.state().head, scene.settings.orthogonal, scene.blobs).basis(key).numpy()


def step(scene: Scene, blobs: dict[str, str], key: str = KEY) -> np.ndarray:
    return matrix(scene, blobs[key]) - matrix(scene, scene.chain.state().head.blobs[key])


def test_a_projected_update_is_orthogonal_to_what_is_protected():
    """Rows of A′ have nothing of Q left, to 1e-12 of their length, and all of the rest; λ = 1/2 leaves a half."""
    rng = np.random.default_rng(0)
    q = leading([torch.tensor(rng.normal(size=(10, 12))) for _ in range(2)], 5)
    a = rng.normal(size=(4, 12)).astype(np.float32)
    clear, half = project(a, q, 1.0), project(a, q, 0.5)
    others = np.linalg.svd(q.numpy().T)[2][5:]
    assert np.abs(clear @ q.numpy()).max() < 1e-12 * np.linalg.norm(a)
    np.testing.assert_allclose(clear @ others.T, a.astype(np.float64) @ others.T, atol=1e-12)
    np.testing.assert_allclose(half @ q.numpy(), 0.5 * a @ q.numpy(), atol=1e-12)
    assert q.shape == (12, 5)
    np.testing.assert_allclose(q.T @ q, np.eye(5), atol=1e-12)


@pytest.mark.parametrize(("d_in", "rank"), [(12, 3), (96, 6)], ids=["whole space", "subspace iteration"])
def test_the_basis_is_where_the_moves_have_their_energy(d_in: int, rank: int) -> None:
    """Against an SVD of the moves, each scaled to norm 1: no less of their energy than the best directions, to 1 %."""
    rng = np.random.default_rng(1)
    decay = 0.8 ** np.arange(d_in)
    moves = [size * rng.normal(size=(20, d_in)) * decay for size in (1.0, 100.0)]
    stacked = np.concatenate([move / np.linalg.norm(move) for move in moves])
    best = np.linalg.svd(stacked)[2][:rank]
    caught = np.linalg.norm(stacked @ leading([torch.tensor(move) for move in moves], rank).numpy()) ** 2
    assert caught >= 0.99 * np.linalg.norm(stacked @ best.T) ** 2


def test_rounding_is_not_protected():
    """A move of two directions protects two, not the noise that fp32 left in the others; no move protects nothing."""
    rng = np.random.default_rng(2)
    before = rng.normal(size=(20, 16)).astype(np.float32)
    move = 0.1 * rng.normal(size=(20, 2)) @ rng.normal(size=(2, 16))
    after = (before + move).astype(np.float32)
    assert leading([torch.tensor(after) - torch.tensor(before)], 8).shape == (16, 2)
    assert leading([], 8) is None


def test_a_fold_moves_nothing_that_earlier_folds_moved(scene: Scene) -> None:
    """Of every expert matrix: protected directions pass as before and the others do not."""
    scene.send("cat", 0, random_delta(5))
    cut = scene.cut()
    with_it = scene.fold(cut)
    scene.settings = SETTINGS
    without = scene.fold(cut)
    scene.settings = SETTINGS.model_copy(update={"orthogonal": ON})
    for key in filter(expert_of, with_it.blobs):
        q, clear, plain = basis(scene, key), step(scene, with_it.blobs, key), step(scene, without.blobs, key)
        assert np.abs(clear @ q).max() < 1e-6  # W is rounded to fp32
        assert np.abs(plain @ q).max() > 1e-3
        np.testing.assert_allclose(clear, plain - plain @ q @ q.T, atol=1e-6)
    assert [row.model_dump() for row in with_it.accepted] == [row.model_dump() for row in without.accepted]


def test_only_the_last_folds_of_devices_are_protected(scene: Scene) -> None:
    """A core update in between is none of the n, and the fold before them is not among them."""
    scene.settle(scene.fold(scene.dense("run-1")))
    scene.send("cat", 0)
    scene.advance()
    protected = protection(scene.chain.state().head, ON, scene.blobs)
    assert [version for version, *_ in protected.folds] == [4, 2]


def test_an_expert_that_no_fold_moved_is_free(tmp_path: Path) -> None:
    """Nothing to protect, in the first fold or of an untouched expert, is the fold without protection, bit by bit."""
    scene = Scene(tmp_path)
    scene.genesis()
    for client, experts in (("ada", (0, 1)), ("bob", (1, 2))):
        scene.send(client, 0, random_delta(1, experts=experts))
        cut, found = scene.cut(), {}
        for settings in (SETTINGS, SETTINGS.model_copy(update={"orthogonal": ON})):
            scene.settings = settings
            found[settings.orthogonal is None] = scene.fold(cut)
        differ = {int(key.rsplit("/")[-1]) for key, d in found[True].blobs.items() if found[False].blobs[key] != d}
        assert differ == (set() if client == "ada" else {1})
        scene.settle(found[False])


def test_off_leaves_no_trace_in_a_manifest():
    """A configuration without it has the bytes that manifests were signed with before there was one."""
    assert b"orthogonal" not in AggregationSettings().to_bytes()
    assert b'"orthogonal":{"rank":3,"strength":1.0,"versions":2}' in AggregationSettings(orthogonal=ON).to_bytes()


def test_replay_makes_the_same_bits(scene: Scene, tmp_path: Path) -> None:
    """From genesis and the archive alone, ancestors rebuilt on the way: every version identical."""
    for sequence in range(2):
        scene.send("cat", sequence)
        scene.advance()
    target = BlobStore(tmp_path / "rebuilt")
    results = replay(scene.chain, archive=scene.archive, genesis=scene.blobs, target=target)
    assert [result.verdict for result in results] == ["identical"] * 5


def test_a_halved_try_takes_half_of_the_same_step(scene: Scene) -> None:
    """The gate's second try folds on the same parent, so it keeps clear of the same directions."""
    scene.send("cat", 0, random_delta(5))
    first = scene.fold(scene.cut())
    half = refold(first, scene.chain.state(), first.rates.halved(), blobs=scene.blobs, archive=scene.archive)
    np.testing.assert_allclose(step(scene, half.blobs), step(scene, first.blobs) / 2, atol=1e-6)
    settled = scene.settle(first, gate=lambda candidate: gate_record(candidate, candidate.rates.eta_t2 < 1))
    assert scene.chain.state().head.blobs == half.blobs, settled


@pytest.mark.parametrize("kind", ["momentum", "nesterov"])
def test_momentum_stays_out_of_what_was_protected(tmp_path: Path, kind: str) -> None:
    """Δ is projected before the outer step: the momentum of a first step has nothing of the protected directions."""
    scene = make_scene(tmp_path, outer=OuterSettings(kind=kind))
    scene.send("cat", 0, random_delta(5))
    made = scene.fold(scene.cut(), Rates(eta_t2=0.5))
    momentum = decode_blob(scene.blobs.get(made.outer[KEY]))["m"].astype(np.float64)
    assert np.abs(momentum @ basis(scene)).max() < 1e-6 < np.abs(momentum).max()
    assert np.abs(step(scene, made.blobs) @ basis(scene)).max() < 1e-6


@pytest.mark.parametrize("harm", ["missing", "corrupt"])
def test_a_lost_slice_of_an_ancestor_is_named(scene: Scene, harm: str) -> None:
    """One clear error that says which version's slice it is and how to get it back; nothing is folded in its stead."""
    path = Path(scene.blobs.location(scene.chain.state().versions[0].blobs[KEY]))
    path.write_bytes(b"bad") if harm == "corrupt" else path.unlink()
    scene.send("cat", 0)
    with pytest.raises(SnapshotError, match=rf"slice {KEY}: .*{harm}.*protects version 1: run fednested tier1 replay"):
        scene.fold(scene.cut())


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_make_the_candidate_of_one_task(tmp_path: Path, shards: int) -> None:
    """Every shard finds the protected directions by itself: the same digest."""
    fed = make_federation(tmp_path, aggregation={"orthogonal": {"versions": 2, "rank": 3}})
    ensure_genesis(fed)
    for sequence in range(2):
        for client in ("ann", "bob"):
            Device(fed, client).send(base=sequence, sequence=sequence)
        cut = take_updates(fed)
        one = fold_updates(fed, cut)
        plan, numbers = aggregate_sharded.plan_fold(fed, cut, shards)
        done = [aggregate_sharded.fold_shard(fed, plan, number) for number in numbers]
        assert aggregate_sharded.collect_fold(fed, cut, plan, done) == one
        assert settle_candidate(fed, one).status == "head"
    assert protection(fed.chain.state().head, ON, fed.blobs).folds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orthogonal": {"versions": 0}}, "aggregation.orthogonal.versions"),
        ({"orthogonal": {"rank": 0}}, "aggregation.orthogonal.rank"),
        ({"orthogonal": {"strength": 1.5}}, "aggregation.orthogonal.strength"),
        ({"orthogonal": {}, "outer": {"kind": "adam"}}, "needs a step that is a sum .* outer optimiser adam"),
        ({"orthogonal": {}, "rule": "coordinate_median"}, "needs a step that is a sum .* rule coordinate_median"),
    ],
)
def test_bad_settings_are_one_error(tmp_path: Path, settings: dict, message: str) -> None:
    """Out of bounds, or combined with what would undo it: refused when the configuration is read."""
    with pytest.raises(ConfigError, match=message):
        load_tier1(make_workspace(tmp_path, aggregation=settings))

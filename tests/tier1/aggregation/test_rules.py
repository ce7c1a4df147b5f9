from __future__ import annotations

import numpy as np
import pytest

from tests import oracle
from tests.tier1.versions.scene import Scene, random_delta, shifted
from tier1.aggregation.fold import one_thread
from tier1.aggregation.gram import Gram, matrix_gram, own_root
from tier1.aggregation.registry import choose
from tier1.aggregation.rules import RULES
from tier1.aggregation.weights import weigh
from tier1.versions.settings import AggregationSettings

GRAM_RULES = [name for name, rule in RULES.items() if not rule.dense]
E = (0, 0)


def settings_of(rule: str, **fields) -> AggregationSettings:
    options = {"multi_krum": {"f": 1, "m": 3}}.get(rule, {})
    root = "root" if RULES[rule].needs_root else None
    return AggregationSettings(rule=rule, rule_options=options, root=root, **fields)


def buffer(seed: int, n: int, spread: float, gauge: bool = True):
    """Draw n low-rank updates that differ by `spread` of their size; with `gauge`, in other factors each time."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(3, 11)), rng.normal(size=(9, 3))
    terms = []
    for i in range(n):
        ai, bi = a + spread * rng.normal(size=a.shape), b + spread * rng.normal(size=b.shape)
        if gauge and i % 2:
            turn = rng.normal(size=(3, 3)) + 3 * np.eye(3)
            ai, bi = turn @ ai, bi @ np.linalg.inv(turn)
        terms.append((1.5, ai, bi))
    dense = np.stack(
        [(np.longdouble(s) * bi.astype(np.longdouble) @ ai.astype(np.longdouble)).ravel() for s, ai, bi in terms]
    )
    with one_thread():
        return matrix_gram(terms), dense, rng.uniform(0.2, 1.0, n)


def spread_of(dense: np.ndarray) -> float:
    return float(np.sqrt(((dense - dense[0]) ** 2).sum(axis=1)).max())


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("rule", GRAM_RULES)
def test_rule_equals_its_dense_definition(rule, spread):
    """The aggregate by Gram matrix is the dense one, to 1e-6 of what the updates differ by, however near they are."""
    for seed in range(6):
        gram, dense, prior = buffer(seed, 7, spread)
        gram = own_root(gram, 2) if RULES[rule].needs_root else gram
        chosen = choose(settings_of(rule))
        weights = chosen.weigh(gram, prior)
        expected = oracle.robust(rule, dense, prior, root=2, **settings_of(rule).rule_options)
        # Σ a·x, with the common part taken out of the sum so that the comparison itself keeps its digits.
        found = weights.astype(np.longdouble) @ (dense - dense[0]) + weights.sum() * dense[0]
        scale = spread_of(dense)
        assert np.abs(found - expected).max() <= 1e-6 * scale + 1e-15 * np.abs(dense).max(), (seed, spread)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6, 1e-8])
def test_distances_keep_their_digits(spread):
    """D² of near-equal updates, in whatever factors they come, equals that of their differences to 1e-6."""
    gram, dense, _ = buffer(0, 6, spread)
    exact = (oracle.distances(dense) ** 2).astype(np.float64)
    away = ~np.eye(6, dtype=bool)
    assert np.abs(gram.distance2[away] / exact[away] - 1).max() <= 1e-6
    np.testing.assert_allclose(gram.inner, (dense @ dense.T).astype(np.float64), rtol=1e-12)


def test_fp32_distances_would_not_do():
    """The formula of a peer, ‖x‖² + ‖y‖² − 2x·y in fp32, is off by more than 1e-6 where ours is not."""
    _, dense, _ = buffer(0, 6, 1e-3)
    x = dense.astype(np.float32)
    squares = (x**2).sum(axis=1)
    cancelled = squares[:, None] + squares[None, :] - 2 * x @ x.T
    exact = oracle.distances(dense) ** 2
    away = ~np.eye(6, dtype=bool)
    assert np.abs(cancelled[away] / exact[away] - 1).max() > 1e-3


def test_equal_updates_have_no_distance():
    """Copies of one update, in equal or in other factors, are at distance zero up to rounding; rules stay finite."""
    gram, _, prior = buffer(3, 5, 0.0)
    assert np.sqrt(gram.distance2.max()) <= 1e-12 * gram.norms.max()
    for rule in GRAM_RULES:
        found = choose(settings_of(rule)).weigh(own_root(gram, 0) if RULES[rule].needs_root else gram, prior)
        assert np.isfinite(found).all()


def test_nearer_pairs_inside_a_near_group():
    """A pair a thousandth as far apart as the rest of its near-equal group is taken again from its own difference."""
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 6)), rng.normal(size=(5, 2))
    shifts = [rng.normal(size=b.shape) * size for size in (0, 1e-4, 1e-4, 1e-4)]
    shifts.append(shifts[3] + 1e-8 * rng.normal(size=b.shape))
    with one_thread():
        gram = matrix_gram([(1.0, a, b + shift) for shift in shifts])
    exact = ((shifts[3] - shifts[4]) @ a) ** 2
    assert gram.distance2[3, 4] == pytest.approx(exact.sum(), rel=1e-5)


def test_scaled_gram_is_the_gram_of_scaled_updates():
    """k kᵀ ∘ G and its distances equal those of k_i·ΔW_i, near-equal updates included."""
    for spread in (1.0, 1e-6):
        gram, dense, _ = buffer(1, 5, spread)
        k = np.minimum(1.0, 0.9 / gram.norms)  # a clip: near-equal updates get near-equal factors
        scaled, x = gram.scaled(k), k[:, None].astype(np.longdouble) * dense
        away = ~np.eye(5, dtype=bool)
        exact = (oracle.distances(x) ** 2).astype(np.float64)
        assert np.abs(scaled.distance2[away] / exact[away] - 1).max() <= 1e-6
        np.testing.assert_allclose(scaled.inner, (x @ x.T).astype(np.float64), rtol=1e-12)


def test_dense_root_equals_its_dense_products():
    """⟨s·B·A, D⟩ comes out without forming s·B·A."""
    rng = np.random.default_rng(0)
    terms = [(0.5, rng.normal(size=(r, 6)), rng.normal(size=(8, r))) for r in (1, 4, 2)]
    root = rng.normal(size=(8, 6)).astype(np.float32)
    with one_thread():
        found = matrix_gram(terms, root).root
    np.testing.assert_allclose(found.inner, [(s * b @ a * root).sum() for s, a, b in terms], rtol=1e-12)
    assert found.norm2 == pytest.approx((root.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("rule", RULES)
def test_uniformly_stale_buffer_is_damped_under_every_rule(rule):
    """Every weight of a buffer with τ = 8 throughout is (1 + 8)^(−½) = 1/3 of the fresh buffer's."""
    fresh, stale = (omegas(rule, [1000] * 7, [tau] * 7) for tau in (0, 8))
    assert sum(fresh) > 0
    np.testing.assert_allclose(stale, np.array(fresh) / 3, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_lone_device_with_few_tokens_is_bounded_under_every_rule(rule):
    """Alone on an expert with 16 tokens of m_min = 256, it moves the expert by a sixteenth of its clipped update."""
    assert omegas(rule, [16], [0]) == [1 / 16]


@pytest.mark.parametrize("rule", RULES)
def test_declared_tokens_buy_nothing_beyond_the_cap(rule):
    """A weight of 10¹² is the weight at the cap, under every rule."""
    assert omegas(rule, [10**12] + [1000] * 6, [0] * 7) == omegas(rule, [1 << 20] + [1000] * 6, [0] * 7)


def omegas(rule: str, tokens: list[int], stalenesses: list[int]) -> list[float]:
    gram = buffer(4, len(tokens), 0.5)[0]
    weighing = weigh(
        ["root", *(f"c{i}" for i in range(1, len(tokens)))],
        [{E: count} for count in tokens],
        stalenesses,
        [1.0] * len(tokens),
        settings_of(rule, max_norm=1e9),
        grams=lambda _experts, _indices: gram,
    )
    return [row[E] for row in weighing.weights]


@pytest.mark.parametrize("rule", ["krum", "multi_krum", "geometric_median", "centred_clipping", "fltrust"])
def test_rule_withstands_what_the_mean_does_not(rule):
    """Two of seven updates turned round and a hundred times as large: the mean follows them, the rule does not."""
    _, dense, prior = buffer(6, 7, 0.3)
    honest = dense[2:].mean(axis=0)
    attacked = dense.copy()
    attacked[:2] *= -100
    gram = Gram(
        inner=(attacked @ attacked.T).astype(np.float64), distance2=(oracle.distances(attacked) ** 2).astype(np.float64)
    )
    gram = own_root(gram, 3)
    options = {"f": 2, "m": 3} if rule == "multi_krum" else {"f": 2} if rule == "krum" else {}
    chosen = choose(settings_of(rule).model_copy(update={"rule_options": options}))
    found = chosen.weigh(gram, np.ones(7)) @ attacked
    mean = attacked.mean(axis=0)
    assert np.linalg.norm(found.astype(float) - honest) < 0.5 * np.linalg.norm(honest.astype(float))
    assert np.linalg.norm(mean.astype(float) - honest) > 10 * np.linalg.norm(honest.astype(float))


def test_foolsgold_weighs_down_copies():
    """Three identities that send one will get less together than any honest device."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(6, 40))
    x[4] = x[3] + 1e-3 * rng.normal(size=40)
    x[5] = x[3] + 1e-3 * rng.normal(size=40)
    gram = Gram(inner=x @ x.T, distance2=oracle.distances(x) ** 2)
    weights = choose(settings_of("foolsgold")).weigh(gram, np.ones(6))
    assert weights[3:].sum() < weights[:3].min()


def test_below_its_minimum_a_rule_is_the_weighted_mean():
    """Krum with f = 1 needs five devices: four get the weighted mean of their clipped updates."""
    assert choose(settings_of("krum")).decides(5)
    assert not choose(settings_of("krum")).decides(4)
    assert omegas("krum", [1000, 3000, 1000, 3000], [0] * 4) == omegas(
        "weighted_mean", [1000, 3000, 1000, 3000], [0] * 4
    )


@pytest.mark.parametrize("rule", RULES)
def test_several_updates_of_a_device_are_judged_as_one(rule):
    """A device that sends its update twice, or in two parts, changes nobody's weight, under any rule."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(7, 30))
    twice = np.concatenate([x, x[-1:]])
    part = 0.3 * rng.normal(size=30)
    split = np.concatenate([x[:-1], [x[-1] + part, x[-1] - part]])
    clients = ["root", *"abcdef"]
    once = device_weights(rule, clients, x, [1000] * 7)
    for vectors in (twice, split):
        found = device_weights(rule, [*clients, "f"], vectors, [1000] * 6 + [500] * 2)
        np.testing.assert_allclose(found[:6], once[:6], rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(found[6:], [once[6] / 2] * 2, rtol=1e-9, atol=1e-15)


def test_one_device_makes_no_majority():
    """Krum with f = 1 needs five devices: one that sends four updates beside two others gets the weighted mean."""
    x = np.random.default_rng(9).normal(size=(6, 30))
    clients, tokens = ["a", "a", "a", "a", "b", "c"], [1000] * 6
    assert device_weights("krum", clients, x, tokens) == device_weights("weighted_mean", clients, x, tokens)


def device_weights(rule: str, clients: list[str], x: np.ndarray, tokens: list[int]) -> list[float]:
    gram = Gram(inner=x @ x.T, distance2=oracle.distances(x) ** 2)
    rows = [{E: count} for count in tokens]
    weighing = weigh(
        clients, rows, [0] * len(x), [1.0] * len(x), settings_of(rule, max_norm=1e9), grams=lambda _e, _i: gram
    )
    return [row[E] for row in weighing.weights]


@pytest.mark.parametrize("rule", ["krum", "multi_krum", "geometric_median", "centred_clipping"])
@pytest.mark.parametrize("factor", [1e2, 1e12, 1e60])
def test_update_of_huge_norm_blurs_no_distance(scene_with, rule, factor):
    """A finite update 10⁶⁰ times too large is one clipped update among others; with Krum it has no weight at all."""
    scene = scene_with(rule)
    common = random_delta(7, size=1.0)
    for i, client in enumerate(CLIENTS):
        delta = shifted(common, -1.0 if client == "ida" else 1.0, seed=i, noise=0.1)
        if client == "ida":
            spec = type(delta.spec)(rank=delta.spec.rank, alpha=delta.spec.alpha * factor)
            delta = type(delta)(spec=spec, factors=delta.factors)
        scene.send(client, 0, delta)
    rows = {row.client_id: row for row in scene.fold(scene.cut()).accepted}
    assert len(rows) == len(CLIENTS)
    assert rows["ida"].cosine < 0
    assert all(row.cosine > 0.9 for client, row in rows.items() if client != "ida")
    for client in CLIENTS[:-1]:
        assert rows[client].distance < 0.5 * rows["ida"].distance
    if "krum" in rule:
        assert rows["ida"].weight == 0.0


CLIENTS = ("ada", "bob", "cat", "dan", "eli", "fay", "ida")


@pytest.fixture
def scene_with(tmp_path):
    def make(rule: str) -> Scene:
        scene = Scene(tmp_path, clients=CLIENTS, settings=settings_of(rule, max_norm=5.0))
        scene.genesis()
        return scene

    return make

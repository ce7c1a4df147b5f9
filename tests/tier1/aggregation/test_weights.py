from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tier1.aggregation.rules import weighted_mean
from tier1.aggregation.weights import (
    clip_factor,
    clip_factors,
    counted_tokens,
    device_clips,
    expert_bound,
    mass,
    prior,
    weigh,
)
from tier1.versions.settings import AggregationSettings

SETTINGS = AggregationSettings(max_norm=1.0, token_cap=1000, min_mass_tokens=64)
E = (0, 3)  # one (layer, expert)


def omegas(
    tokens: list[int], stalenesses: list[int], settings: AggregationSettings = SETTINGS, clients: str = "abcdefghijkl"
) -> list[float]:
    """Weigh updates that adapt the one expert E, unclipped; each is of another client unless `clients` says."""
    columns = [{E: count} for count in tokens], stalenesses, [1.0] * len(tokens)
    rows = weigh(clients[: len(tokens)], *columns, settings).weights
    return [row.get(E, 0.0) for row in rows]


def test_fresh_lone_client_with_enough_tokens_gets_its_whole_delta():
    """A fresh update counts 1, not the 0.5 of a version counter that is incremented before the discount."""
    assert omegas([64], [0]) == [1.0]


def test_lone_client_with_few_tokens_does_not_own_an_expert():
    """Below m_min tokens the step shrinks in proportion: 16 of 64 tokens give a quarter."""
    assert omegas([16], [0]) == [0.25]


def test_uniformly_stale_buffer_takes_a_smaller_step():
    """Renormalising inside the buffer would erase staleness; the mass puts it back: (1 + 8)^(-1/2) = 1/3."""
    assert sum(omegas([100, 300], [8, 8])) == pytest.approx(1 / 3)
    assert sum(omegas([100, 300], [0, 0])) == pytest.approx(1.0)


def test_stale_update_weighs_less_than_a_fresh_one_of_equal_tokens():
    """A τ = 8 update has a third of a fresh one's weight, not the half that the premature increment gives."""
    fresh, stale = omegas([128, 128], [0, 8])
    assert stale / fresh == pytest.approx(1 / 3)


def test_tokens_are_capped():
    """A client that declares a billion tokens weighs as much as one at the cap."""
    assert omegas([10**9, 1000], [0, 0]) == [0.5, 0.5]


def test_zero_token_expert_is_withheld():
    """Zero tokens mean that the device withheld the expert: no weight, and it does not count as coverage."""
    settings = SETTINGS.model_copy(update={"min_coverage": 2})
    assert weigh("a", [{E: 0}], [0], [1.0], SETTINGS).weights == [{}]
    assert omegas([0, 128], [0, 0], settings) == [0.0, 0.5]  # n_e = 1 of k_min = 2


def test_experts_are_weighed_apart():
    """Each expert is shared among the clients that cover it, whatever they do elsewhere."""
    a, b = (0, 0), (1, 0)
    rows = weigh("ab", [{a: 100, b: 100}, {b: 300}], [0, 0], [1.0, 1.0], SETTINGS).weights
    assert rows == [{a: 1.0, b: 0.25}, {b: 0.75}]


def test_clip_scales_the_weight_of_every_expert():
    """k_d multiplies ω of all experts of the client."""
    rows = weigh("a", [{(0, 0): 100, (1, 1): 100}], [0], [0.5], SETTINGS).weights
    assert rows == [{(0, 0): 0.5, (1, 1): 0.5}]


@given(norm=st.floats(0, 1e300), bound=st.floats(1e-6, 1e6))
def test_clipped_norm_stays_within_the_bound(norm: float, bound: float):
    """k·‖ΔW‖ ≤ C for every norm, and an update within the bound is not touched."""
    k = clip_factor(norm, bound)
    assert 0 < k <= 1
    assert k * norm <= bound * (1 + 1e-12)
    assert k == 1.0 or norm > bound


updates = st.lists(st.tuples(st.integers(1, 10**7), st.integers(0, 40), st.floats(1e-3, 1.0)), min_size=1, max_size=12)


@given(rows=updates, data=st.data())
def test_order_of_updates_does_not_show_in_a_single_bit(rows, data):
    """Permuting the buffer permutes the weights and changes none of them."""
    order = data.draw(st.permutations(range(len(rows))))

    def run(indices):
        chosen = [rows[i] for i in indices]
        clients = [str(i % 4) for i in indices]  # some send several
        taus, clips = [tau for _, tau, _ in chosen], [k for *_, k in chosen]
        result = weigh(clients, [{E: n} for n, _, _ in chosen], taus, clips, SETTINGS).weights
        return {i: row[E] for i, row in zip(indices, result, strict=True)}

    assert run(order) == run(range(len(rows)))


@given(rows=updates)
def test_total_weight_never_exceeds_one(rows):
    """Σω ≤ 1 per expert, so a fold moves an expert by at most η·C."""
    tokens, stalenesses = [n for n, _, _ in rows], [tau for _, tau, _ in rows]
    assert sum(omegas(tokens, stalenesses)) <= 1 + 1e-12
    assert sum(omegas(tokens, stalenesses, clients="aababcabcabb")) <= 1 + 1e-12


@given(parts=st.lists(st.integers(1, 10**7), min_size=1, max_size=6), other=st.integers(1, 10**7))
def test_several_updates_of_a_client_weigh_as_one(parts, other):
    """A device that sends its tokens in parts counts once: in coverage, under the cap, and in the mass."""
    settings = SETTINGS.model_copy(update={"min_coverage": 3})
    split = omegas([*parts, other], [0] * (len(parts) + 1), settings, clients="a" * len(parts) + "b")
    whole = omegas([sum(parts), other], [0, 0], settings)
    assert math.isclose(sum(split[:-1]), whole[0])
    assert math.isclose(split[-1], whole[1])


@given(rows=updates)
def test_one_update_per_client_is_the_plain_formula_to_the_bit(rows):
    """Sharing bounds among the updates of a client changes no bit where every client sends one."""
    tokens, stalenesses = [min(n, 1000) for n, *_ in rows], [tau for _, tau, _ in rows]
    priors = [n * (1.0 + tau) ** -0.5 for n, tau in zip(tokens, stalenesses, strict=True)]
    step = math.fsum(priors) / max(sum(tokens), 64)
    expected = [share * step for share in weighted_mean(None, priors).tolist()]
    assert omegas([n for n, *_ in rows], stalenesses) == expected


def test_one_client_is_no_coverage():
    """Five updates of one device are one of k_min = 5."""
    settings = SETTINGS.model_copy(update={"min_coverage": 5})
    assert sum(omegas([100] * 5, [0] * 5, settings, clients="aaaaa")) == pytest.approx(0.2)


def test_the_cap_is_shared_by_the_updates_of_a_client():
    """Cap 1000: 1500 + 500 of one client count 750 + 250; another below it counts in full."""
    assert counted_tokens("aab", [1500, 500, 300], 1000) == [750.0, 250.0, 300]


@given(norms=st.lists(st.floats(0, 1e300), min_size=1, max_size=6), bound=st.floats(1e-6, 1e6))
def test_the_clip_is_shared_by_the_updates_of_a_client(norms, bound):
    """√Σ(k·‖ΔW‖)² ≤ C over a client's updates, huge norms included; a client with one update is clipped as ever."""
    clips = clip_factors("a" * len(norms) + "b", [*norms, norms[0]], bound)
    assert math.hypot(*(k * norm for k, norm in zip(clips[:-1], norms, strict=True))) <= bound * (1 + 1e-9)
    assert clips[-1] == clip_factor(norms[0], bound)


def test_clip_factors_by_hand():
    """√(3² + 4²) = 5, so both are halved under C = 2.5."""
    assert clip_factors("aab", [3.0, 4.0, 2.0], 2.5) == [0.5, 0.5, 1.0]


def test_rule_normalises():
    """The weighted mean returns shares that sum to one, in proportion to the priors."""
    assert weighted_mean(None, [1.0, 3.0]).tolist() == [0.25, 0.75]


def test_prior_and_mass_follow_the_formula():
    """Golden numbers by hand: 100·4^(-1/2) = 50; (50 + 20) / max(100 + 20, 64) = 7/12."""
    assert prior(100, 3, SETTINGS) == 50.0
    assert math.isclose(mass("ab", [100, 20], [50.0, 20.0], SETTINGS), 70 / 120)


def test_what_is_usual_bounds_a_device_and_each_of_its_experts():
    """With ratios no device moves more than the median one per expert, however spread; the quiet are untouched."""
    full, lone = {(0, e): 100 for e in range(4)}, {(0, 0): 100}
    settings = AggregationSettings(norm_ratio=1.0, expert_norm_ratio=1.5)
    clips = device_clips("abcde", [2.0, 2.0, 1.0, 200.0, 40.0], [full, full, full, full, lone], settings)
    assert clips == pytest.approx([1.0, 1.0, 1.0, 0.01, 1 / 40])  # u = 2/√4 = 1; 200 → 2, a lone expert's 40 → 1
    wide = {(0, e): 100 for e in range(16)}
    assert device_clips("abc", [2.0, 2.0, 4.0], [full, full, wide], settings) == [1.0, 1.0, 0.5]
    norms = [2.0, 2.0, 1.0, 2.0, 1.0]
    assert expert_bound("abcde", norms, [full, full, full, full, lone], settings) == pytest.approx(1.5)
    assert expert_bound("abcde", norms, [full] * 5, AggregationSettings(max_expert_norm=3.0)) == 3.0
    assert device_clips("ab", [1.0, 1e9], [full, full], settings) == pytest.approx([1.0, 1e-9])  # not its own judge


def test_a_device_that_withheld_everything_is_nobodys_measure():
    """Zeros with no tokens, as a sidecar sends them, neither clip the others to nothing nor are clipped."""
    settings, full = AggregationSettings(norm_ratio=1.0, expert_norm_ratio=1.5), {(0, e): 100 for e in range(4)}
    assert device_clips("ab", [0.0, 2.0], [{E: 0}, full], settings) == [1.0, 1.0]
    assert expert_bound("ab", [0.0, 2.0], [{E: 0}, full], settings) == pytest.approx(1.5)
    assert device_clips("a", [0.0], [{E: 0}], settings) == [1.0]
    assert expert_bound("a", [0.0], [{E: 0}], settings) == math.inf


def test_tokens_beyond_the_usual_do_not_count():
    """With a token ratio a claim of 10¹² on an expert counts as the median device's tokens, and mass stays 1."""
    settings = AggregationSettings(token_ratio=1.0)
    rows = weigh("abc", [{E: 1000}, {E: 1000}, {E: 10**12}], [0] * 3, [1.0] * 3, settings).weights
    assert [row[E] for row in rows] == pytest.approx([1 / 3] * 3)


def test_an_expert_that_hardly_anybody_saw_is_hardly_moved():
    """Three of ten devices write into an expert that the others never routed to: 3 of 0.5·10 shares, or less."""
    settings = AggregationSettings(mass_ratio=0.5, min_mass_tokens=1)
    usual = {(1, e): 100 for e in range(4)}

    def step(tokens: int) -> float:
        rows = [usual] * 7 + [{**usual, E: tokens}] * 3
        weights = weigh("abcdefghij", rows, [0] * 10, [1.0] * 10, settings).weights
        assert sum(row[1, 0] for row in weights) == pytest.approx(1.0)
        return sum(row.get(E, 0.0) for row in weights)

    assert step(10**12) == pytest.approx(0.6)  # v = 100, whatever three of ten claim
    assert step(100) == pytest.approx(0.6)
    assert step(10) == pytest.approx(0.06)


def test_settings_that_came_later_leave_no_trace_at_their_defaults():
    """Manifests of older releases keep their bytes: what was added is written only where it is set."""
    for name in ("probe", "norm_ratio", "expert_norm_ratio", "token_ratio", "mass_ratio"):
        assert name.encode() not in AggregationSettings().to_bytes()
        assert f'"{name}":1.0'.encode() in AggregationSettings(**{name: 1.0}).to_bytes()

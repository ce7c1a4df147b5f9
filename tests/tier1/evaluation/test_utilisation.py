from __future__ import annotations

import pytest

from tier1.evaluation.metrics import metrics_of
from tier1.evaluation.suites import SuiteResult
from tier1.evaluation.utilisation import expert_use

EVEN = [100, 100, 100, 100, 100, 100, 100, 100]


def standing(*layers):
    """Return expert -> standing of layer 0, each argument being one suite's counts."""
    return {use.name: use.standing for use in expert_use({f"s{i}": {"0": row} for i, row in enumerate(layers)})}


def test_a_balanced_layer_has_nothing_to_report():
    """Guards the zero: even shares, of suites of any length, are load 1 and no standing."""
    uses = expert_use({"a": {"0": EVEN, "3": EVEN}, "b": {"0": [7] * 8, "3": [1] * 8}})
    assert [use.name for use in uses[7:9]] == ["l0.e7", "l3.e0"]
    assert all(use.load == pytest.approx(1.0) for use in uses)
    assert all(use.specialisation == pytest.approx(0.0) for use in uses)
    assert not any(use.standing for use in uses)


def test_dead_overloaded_and_specialised_experts_are_named_first():
    """Guards the three bounds, on both sides, and that a dead expert is not called specialised as well."""
    found = standing([0, 400, 80, 12, 100, 100, 54, 54], [0, 400, 0, 12, 100, 100, 94, 94])
    assert found == {
        **{"l0.e0": ("dead",), "l0.e1": ("overloaded",), "l0.e2": ("specialised",), "l0.e3": ()},
        **{"l0.e4": (), "l0.e5": (), "l0.e6": (), "l0.e7": ()},
    }
    assert list(found)[:3] == ["l0.e0", "l0.e1", "l0.e2"]
    assert standing([9, 1000, 1000, 1000, 1000, 1000, 1000, 1000])["l0.e0"] == ("dead",)
    assert standing([99, *[100] * 7])["l0.e0"] == ()


def test_specialisation_is_one_minus_the_normalised_entropy():
    """Guards the formula: one suite's own expert is 1, four to one of two suites 0.278, a single suite says nothing."""
    two = expert_use({"a": {"0": [80, 20, 100, 0]}, "b": {"0": [20, 80, 0, 100]}})
    by_name = {use.name: use.specialisation for use in two}
    # 1 - H(0.8, 0.2) / ln 2 = 1 - 0.5004 / 0.6931
    assert by_name["l0.e0"] == pytest.approx(0.2781, abs=1e-4)
    assert by_name["l0.e2"] == pytest.approx(1.0)
    assert all(use.specialisation == 0 for use in expert_use({"a": {"0": [5, 0, 1]}}))


def test_no_routing_is_no_report():
    """Guards results without routing: they count as nothing, not as dead experts."""
    assert expert_use({}) == []
    assert expert_use({"a": {}}) == []


def test_metrics_are_finite_and_named_by_suite():
    """Guards what the registry shows: perplexity with its ends, and nothing that MLflow cannot store."""
    result = SuiteResult(
        **{"nats_per_token": 2.0, "bits_per_byte": 1.0, "n_tokens": 4, "n_bytes": 4, "rows": "ab" * 32},
        **{"row_nats": [1.0, 3.0], "row_hits": [0.0, 0.5], "completions": [1, 0], "routed": {"0": [0, 8]}},
    )
    found = metrics_of({"plays": result})
    assert found["perplexity.plays"] == pytest.approx(7.389, abs=1e-3)
    assert found["perplexity.plays.low"] < found["perplexity.plays"] < found["perplexity.plays.high"]
    assert (found["accuracy.plays"], found["completions.plays"], found["experts.dead"]) == (0.25, 0.5, 1.0)
    huge = SuiteResult(nats_per_token=1e4, bits_per_byte=1.0, n_tokens=1, n_bytes=1)
    assert metrics_of({"a": huge}) == {}

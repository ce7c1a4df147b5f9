from __future__ import annotations

import math

import pytest

from tier1.evaluation.gate import judge
from tier1.evaluation.suites import SuiteResult


def result(nats):
    return SuiteResult(nats_per_token=nats, bits_per_byte=nats, n_tokens=10, n_bytes=20)


def results(**nats):
    return {name: result(value) for name, value in nats.items()}


def test_improvement_and_small_regressions_pass():
    """Guards the bound: a rise up to it passes, and the rows come in the order of their names."""
    report = judge(results(b=4.0, a=3.0), results(a=3.05, b=3.5), max_regression=0.06)
    assert report.passed
    assert [(row.suite, round(row.change, 3), row.passed) for row in report.rows] == [
        ("a", 0.05, True),
        ("b", -0.5, True),
    ]
    assert report.reason == "all 2 suites within their bound"


def test_one_forgotten_domain_fails_whatever_the_others_gain():
    """Guards that no mean hides a forgotten suite."""
    report = judge(results(a=4.0, b=4.0), results(a=1.0, b=4.2), max_regression=0.1)
    assert not report.passed
    assert [row.passed for row in report.rows] == [True, False]
    assert report.reason == "suite b: loss rose by 0.2000 nats per token, bound 0.1"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_fails_on_either_side(bad):
    """Guards that NaN, which compares false with everything, never passes."""
    for before, after in ((4.0, bad), (bad, 4.0), (bad, bad)):
        report = judge(results(a=before), results(a=after), max_regression=1e9)
        assert not report.passed
        assert "not finite" in report.reason


def test_a_missing_suite_fails_and_a_new_one_does_not():
    """Guards that a suite cannot be dropped, and that one may be added."""
    assert not judge(results(a=4.0, b=4.0), results(a=4.0), max_regression=1.0).passed
    assert judge(results(a=4.0), results(a=4.0, b=9.0), max_regression=0.0).passed
    assert not judge(results(a=4.0), results(a=4.0, b=math.nan), max_regression=0.0).passed


def test_nothing_measured_fails():
    """Guards that an empty evaluation is no evaluation."""
    assert not judge({}, {}, max_regression=1.0).passed

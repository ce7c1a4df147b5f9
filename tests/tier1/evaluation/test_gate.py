from __future__ import annotations

import math

import pytest

from tier1.evaluation.gate import Bound
from tier1.evaluation.gate import judge as judged
from tier1.evaluation.suites import SuiteResult


def judge(before, after, *, max_regression):
    return judged(before, after, default=Bound(max_regression=max_regression))


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


def rows_of(*row_nats, rows="ab" * 32):
    return SuiteResult(
        nats_per_token=sum(row_nats) / len(row_nats),
        bits_per_byte=1.0,
        n_tokens=10,
        n_bytes=20,
        rows=rows,
        lines=[10 * (i + 1) for i in range(len(row_nats))],
        row_nats=list(row_nats),
        row_hits=[0.5] * len(row_nats),
    )


NOISY = ([4.0] * 20, [4.0 + (0.5 if i % 2 else -0.3) for i in range(20)])  # rises by 0.1, give or take
STEADY = ([4.0 + 0.1 * i for i in range(20)], [4.0 + 0.1 * i + 0.1 for i in range(20)])  # by 0.1 in every row


@pytest.mark.parametrize(
    ("losses", "bound", "low", "mean", "high"),
    [
        (NOISY, 0.05, True, False, False),
        (NOISY, 0.15, True, True, False),
        (STEADY, 0.09, False, False, False),
        (STEADY, 0.11, True, True, True),
    ],
)
def test_the_interval_may_judge_instead_of_the_mean(losses, bound, low, mean, high):
    """Guards what fails: a rise that is significantly above, one whose mean is, or one not significantly within."""
    before, after = ({"a": rows_of(*each)} for each in losses)
    for judged_by, passes in (("low", low), ("mean", mean), ("high", high)):
        rule = Bound(max_regression=bound, judged_by=judged_by)
        assert judged(before, after, default=rule).passed is passes, judged_by
        strict = Bound(max_regression=0.0)
        assert judged(before, after, default=strict, bounds={"a": rule}).passed is passes, "a bound of its own"


def test_rows_that_rise_in_step_have_a_narrow_interval():
    """Guards the pairing: rows differ by nats among each other and by nothing between parent and candidate."""
    before, after = ({"a": rows_of(*each)} for each in STEADY)
    (row,) = judged(before, after, default=Bound(max_regression=0.05)).rows
    assert row.change_interval == pytest.approx((0.1, 0.1))
    assert row.after_interval[1] - row.after_interval[0] > 0.3


def test_the_verdict_names_where_a_failed_suite_rose_most():
    """Guards the record of a failure: lines, worst first, only of rows that rose, never what they say."""
    before, after = {"a": rows_of(1.0, 1.0, 1.0)}, {"a": rows_of(1.2, 0.5, 2.0)}
    report = judged(before, after, default=Bound(max_regression=0.1))
    assert report.rows[0].worst_lines == [30, 10]
    assert report.reason.endswith("most from line 30, 10")
    assert judged(before, after, default=Bound(max_regression=1.0)).rows[0].worst_lines == []


def test_what_cannot_be_compared_is_not_passed():
    """Guards against another tokenizer, whose losses per token mean something else, and a suite without an interval."""
    other = judged(
        {"a": rows_of(4.0, 4.0)}, {"a": rows_of(1.0, 1.0, rows="cd" * 32)}, default=Bound(max_regression=1.0)
    )
    assert not other.passed
    assert "measured on other token rows" in other.reason
    single = {"a": rows_of(4.0)}
    assert judged(single, single, default=Bound(max_regression=1.0)).passed
    alone = judged(single, single, default=Bound(max_regression=1.0, judged_by="low"))
    assert "fewer than two rows" in alone.reason


def test_nothing_measured_fails():
    """Guards that an empty evaluation is no evaluation."""
    assert not judge({}, {}, max_regression=1.0).passed

from __future__ import annotations

import numpy as np
import pytest

from tier1.evaluation import bootstrap
from tier1.evaluation.bootstrap import interval

SEED = "0123456789abcdef" * 4


def test_the_interval_is_that_of_the_mean():
    """Guards the formula: of many rows it is mean ± 1.96 standard errors, and holds the mean."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = interval(values, SEED)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_an_interval_is_a_function_of_values_and_seed():
    """Guards the verdict: the same bits in every run, other rows for another seed."""
    values = np.arange(30) ** 2 / 7
    assert interval(values, SEED) == interval(values.copy(), SEED)
    assert interval(values, SEED) != interval(values, SEED[::-1])
    # Golden: what Philox draws for this seed, so that a release of numpy that drew otherwise would show.
    assert interval(np.arange(8.0), SEED) == (1.875, 5.125)


def test_no_interval_without_rows_or_with_a_broken_one():
    """Guards the ends: one row says nothing of its spread, and NaN is no bound."""
    assert interval(np.array([]), SEED) is None
    assert interval(np.array([1.0]), SEED) is None
    assert interval(np.array([1.0, np.nan, 2.0]), SEED) is None
    assert interval(np.full(5, 2.5), SEED) == (2.5, 2.5)


def test_many_rows_are_drawn_in_runs(monkeypatch):
    """Guards memory: more rows than the limit give about the same interval, whatever the last run's length."""
    values = np.random.default_rng(1).normal(0.0, 1.0, 1003)
    whole = interval(values, SEED)
    monkeypatch.setattr(bootstrap, "MAX_UNITS", 100)
    totals, sizes = bootstrap._units(values)
    assert len(totals) == 100
    assert sizes.sum() == 1003
    assert interval(values, SEED) == pytest.approx(whole, abs=0.02)

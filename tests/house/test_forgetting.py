"""The arithmetic of the five-domain benchmark, on losses that can be judged by eye."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.forgetting import Remembered, kept_gains, remembered


def test_forgetting_is_the_rise_over_the_best_value_as_a_share_of_the_gain():
    """Domain 1 gained 4 and lost 1 of it, domain 2 gained 2 and lost nothing: 12.5 %; the newest cannot forget."""
    losses = np.array(
        [
            [3.0, 8.0, 6.0, 9.0],
            [3.2, 4.5, 6.5, 9.0],
            [2.9, 4.0, 4.0, 9.5],
            [3.5, 5.0, 4.0, 2.0],
        ]
    )
    found = remembered(losses)
    assert found == Remembered(forgetting=0.125, newest=7.0, gained=3.0, base=pytest.approx(0.6))


def test_a_domain_that_gained_nothing_stops_the_benchmark():
    """A share of no gain is no figure."""
    with pytest.raises(RuntimeError, match="gained nothing"):
        remembered(np.array([[1.0, 2.0, 2.0], [1.0, 2.0, 1.0]]))


def test_what_is_kept_is_compared_seed_by_seed():
    """The newest domain's gain with safeguards over that without, of the same seed."""
    own, plain = (
        [Remembered(forgetting=0, newest=n, gained=1, base=0) for n in gains] for gains in ((1.0, 3.0), (2.0, 4.0))
    )
    assert kept_gains(own, plain) == [50.0, 75.0]

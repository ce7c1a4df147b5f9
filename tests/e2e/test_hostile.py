"""A small `benchmarks.hostile`: what keeps a fleet learning, and that the benchmark notices where nothing does."""

from __future__ import annotations

import pytest
import structlog

from benchmarks.hostile import ATTACKS, measure, play
from benchmarks.world import Sizes, World

SMALL = Sizes(core_steps=100, local_steps=6, suite_tokens=384, judge_tokens=768)


@pytest.fixture(autouse=True)
def quiet():
    import logging

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()


@pytest.mark.slow
def test_three_hostile_devices_of_ten_do_not_stop_the_others():
    """The default of a new workspace keeps the gain under attacks on direction, size and finiteness."""
    results = measure(0, rounds=2, attacks=("sign flip", "x100", "NaN"), sizes=SMALL)
    assert results.clean.gain > 0
    assert results.clean_kept >= 98
    assert {name: results.kept(name) >= 90 for name in results.attacked} == dict.fromkeys(results.attacked, True)
    assert all(outcome.non_finite == 0 for outcome in results.outcomes)
    assert results.attacked["NaN"].refused == {"non_finite": 6}
    assert results.attacked["sign flip"].refused == {"harmful": 6}


@pytest.mark.slow
def test_the_weighted_mean_does_not_survive_them(tmp_path):
    """The planted weakness: without probe and with a clip that never bites, the benchmark sees the gain go."""
    world = World(tmp_path, 0, SMALL)
    weak = {"max_norm": 1e12}
    clean = play(world, "clean", None, rounds=2, aggregation=weak)
    lost = {
        name: play(world, name, ATTACKS[name], rounds=2, aggregation=weak).gain / clean.gain
        for name in ("sign flip", "x100")
    }
    assert lost["sign flip"] < 0.8
    assert lost["x100"] < 0.5

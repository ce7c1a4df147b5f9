"""The experts that a device adapts are those that its text is routed to, chosen once and kept."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fednested_lib.adapters import attach
from fednested_lib.config import BudgetConfig
from fednested_lib.delta import AdapterSpec
from fednested_lib.errors import ConfigError, DataError, StorageError
from fednested_lib.expert_choice import Routing, choose, expert_bytes, kept_choice, profile
from fednested_lib.frozen import quantise_experts
from fednested_lib.training import train_adapters

ROWS = np.random.default_rng(0).integers(0, 96, (12, 17), dtype=np.int32)
SHAPES = {
    f"model.layers.{layer}.mlp.experts.{projection}": shape
    for layer in (0, 2)
    for projection, shape in (("gate_up_proj", (4, 24, 16)), ("down_proj", (4, 16, 12)))
}
COUNTS = {
    0: Routing(tokens=np.array([50, 90, 90, 10]), distinct=np.array([20, 30, 40, 9])),
    2: Routing(tokens=np.array([5, 200, 30, 5]), distinct=np.array([5, 4, 20, 5])),
}


@pytest.mark.parametrize("form", [None, "int8"])
def test_profile_counts_what_training_counts(make_model, family, form):
    """Tokens and distinct tokens per expert are those that adapters on every expert count over the same rows."""
    model = make_model(family)
    if form:
        quantise_experts(model, form)
    if form:
        from fednested_lib.adapters import IMPLEMENTATION, register

        register()
        model.set_experts_implementation(IMPLEMENTATION)
    routing, n_tokens = profile(model, ROWS)
    assert n_tokens == 12 * 16
    adapters = attach(model, AdapterSpec(rank=2, alpha=4.0), None, seed=0)
    # A first step of a rate of nothing, so that the routing of later layers is that of the frozen model.
    train_adapters(model, adapters, ROWS, steps=1, batch_size=12, learning_rate=1e-12, seed=0)
    assert {layer: each.tokens.tolist() for layer, each in routing.items()} == adapters.tokens
    assert {layer: each.distinct.tolist() for layer, each in routing.items()} == adapters.distinct_tokens


def test_profile_takes_a_bounded_sample(make_model):
    """Rows are evenly spaced and no more than the bound, but at least one; hooks are gone afterwards."""
    model = make_model("mixtral")
    assert [profile(model, ROWS, max_tokens=most)[1] for most in (1, 47, 48, 10_000)] == [16, 32, 48, 192]
    every_fourth, _ = profile(model, ROWS, max_tokens=48)
    same, _ = profile(model, ROWS[::4])
    assert all(np.array_equal(every_fourth[layer].tokens, same[layer].tokens) for layer in same)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_most_routed_experts_are_chosen_within_the_budget():
    """Most tokens first, the lower id of equals, and never one that saw fewer distinct tokens than may leave."""
    how = {"rank": 2, "min_distinct": 5, "shapes": SHAPES}
    assert choose(COUNTS, BudgetConfig(experts=1), **how) == {0: (1,), 2: (2,)}
    assert choose(COUNTS, BudgetConfig(experts=2), **how) == {0: (1, 2), 2: (0, 2)}
    assert choose(COUNTS, BudgetConfig(experts=9), **how) == {0: (0, 1, 2, 3), 2: (0, 2, 3)}
    size = expert_bytes(0, 2, SHAPES)
    assert size == 4 * 2 * (24 + 16 + 16 + 12)
    assert choose(COUNTS, BudgetConfig(megabytes=3.5 * size / 1e6), **how) == {0: (0, 1, 2), 2: ()}
    assert choose(COUNTS, BudgetConfig(megabytes=4 * size / 1e6), **how) == {0: (0, 1, 2), 2: (2,)}


def test_a_choice_of_nothing_is_an_error():
    """Too little text and too small a budget are named with the bound and what to change."""
    with pytest.raises(DataError, match="no expert saw 41 distinct tokens.*the most is 40: add text"):
        choose(COUNTS, BudgetConfig(experts=1), rank=2, min_distinct=41, shapes=SHAPES)
    with pytest.raises(ConfigError, match=r"megabytes = 0.0005 has no room .* 0.000544: raise it"):
        choose(COUNTS, BudgetConfig(megabytes=0.0005), rank=2, min_distinct=1, shapes=SHAPES)


def _kept(path, model, *, rows=ROWS, budget=BudgetConfig(experts=2), version=3, rank=2, now=1e9, days=None):
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters() if ".experts." in name}
    how = {"rank": rank, "min_distinct": 4, "shapes": shapes, "base_version": version, "now": now}
    return kept_choice(path, model, rows, budget, **how, period_days=days)


def test_the_choice_stays_for_the_period(make_model, tmp_path):
    """Another base and other text change nothing until the file is removed; then they do. Numbers alone are kept."""
    path, model, other = tmp_path / "trainer/experts.json", make_model("mixtral"), make_model("mixtral", seed=1)
    first = _kept(path, model)
    data = path.read_bytes()
    assert _kept(path, other, rows=ROWS[:1], version=4) == first
    assert path.read_bytes() == data
    path.unlink()
    assert _kept(path, model) == first  # a device that died before it wrote its choice makes the same one
    assert path.read_bytes() == data
    path.unlink()
    assert _kept(path, other).experts != first.experts
    document = json.loads(data)
    assert set(document) == {
        "chosen_s", "base_version", "sample_tokens", "rank", "budget", "experts", "tokens", "distinct_tokens",
    }  # fmt: skip
    assert all(len(document["experts"][layer]) == 2 for layer in ("0", "1", "2"))


def test_a_period_of_days_ends_by_itself(make_model, tmp_path):
    """With `period_days` the choice is made anew when they are over, and not a second before."""
    path, model, other = tmp_path / "experts.json", make_model("mixtral"), make_model("mixtral", seed=1)
    first, end = _kept(path, model, days=3), 1e9 + 3 * 86_400
    assert _kept(path, other, days=3, now=end - 1) == first
    second = _kept(path, other, days=3, now=end)
    assert second.experts != first.experts
    assert second.chosen_s == end
    assert _kept(path, model, days=3, now=end + 1) == second


def test_a_choice_that_does_not_fit_is_refused(make_model, tmp_path):
    """Another budget, rank or model, and an altered file: one line with the remedy, never a silent new choice."""
    path, model = tmp_path / "experts.json", make_model("mixtral")
    _kept(path, model)
    for changes in ({"budget": BudgetConfig(experts=3)}, {"rank": 1}):
        with pytest.raises(ConfigError, match="stays for its period: put them back, or run `fednested tier2 forget"):
            _kept(path, model, **changes)
    with pytest.raises(ConfigError, match="not of this model"):
        _kept(path, make_model("mixtral", experts=2))
    path.write_text("{}")
    with pytest.raises(StorageError, match="is unusable"):
        _kept(path, model)

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.alternating import alternate, dead_share
from benchmarks.co_training import Plan, compare
from benchmarks.world import MODEL, Sizes

TINY = {**MODEL, "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4}


def test_two_clusters_learn_through_the_chain_and_traffic_is_counted():
    """A small version of the row: both ways gain, versions replay, and traffic falls with the steps between rounds."""
    row = compare(7, Plan(rounds=2, steps=8, batch=4), TINY)
    assert row.one < row.begin > row.two
    assert row.kept > 70
    assert row.traffic * 8 == pytest.approx(
        75, rel=0.05
    )  # per step: ½ published and 1 fetched, of 1 sent and 1 received
    assert row.replayed == {"identical": 3}


def test_alternating_versions_are_measured():
    """A small version of the row: core updates and device folds alternate, and each row says what made it."""
    rows = alternate(7, 2, Sizes(n_devices=3, core_steps=20, local_steps=3, suite_tokens=256, judge_tokens=256))
    assert [row.made_by for row in rows] == ["tier 1", "core", "devices"]
    assert rows[-1].device < rows[0].device
    assert rows[-1].rank > 2  # more than the smallest device's: folds do not collapse to the shared rank
    assert [row.rank is None for row in rows] == [True, True, False]


def test_dead_experts_are_counted_per_layer():
    """An expert below a tenth of an even share is dead; with two of four experts for all tokens half are."""

    class Router(torch.nn.Module):
        config = type("Config", (), {"num_experts_per_tok": 1})

        def forward(self, input_ids, output_router_logits):
            assert output_router_logits
            chosen = torch.nn.functional.one_hot(input_ids.reshape(-1) % 2, 4).float()
            even = torch.nn.functional.one_hot(torch.arange(input_ids.numel()) % 4, 4).float()
            return type("Output", (), {"router_logits": (chosen, even)})

    rows = np.arange(4 * 9, dtype=np.int32).reshape(4, 9)
    assert dead_share(Router(), rows) == 0.25

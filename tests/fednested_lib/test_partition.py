"""Every parameter of every family has exactly one group, and nothing is guessed."""

from __future__ import annotations

import pytest

from fednested_lib import partition
from fednested_lib.errors import PartitionError
from fednested_lib.partition import expert_name, expert_param, group_of


def test_every_parameter_has_one_group(make_model, family):
    """Every parameter of a real model is named by exactly one rule, and each group is what it should be."""
    import re

    model = make_model(family)
    groups = {}
    for name, parameter in model.named_parameters():
        rules = [pattern for pattern in partition._RULES[family] if re.fullmatch(pattern, name)]
        assert len(rules) == 1, name
        groups.setdefault(group_of(name, family), {})[name] = parameter
    assert all(parameter.dim() == 3 for parameter in groups["experts"].values())
    assert {name.split("mlp.")[1] for name in groups["router"]} == {"gate.weight"}
    assert len(groups["router"]) * 2 == len(groups["experts"])
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(groups["core"])


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.gate_up_proj_bias",
        "model.layers.0.mlp.experts.0.w1.weight",  # the on-disk name
        "model.layers.01.mlp.gate.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "xmodel.norm.weight",
        "model.norm.weight\n",
        "",
    ],
)
def test_unnamed_parameter_is_an_error(family, name):
    """A parameter that no rule names stops, with its name and the file to change."""
    with pytest.raises(PartitionError, match=r"no rule .*partition\.py"):
        group_of(name, family)


def test_rules_of_one_family_do_not_serve_another():
    """Dense layers and query norms exist in some families only, so elsewhere they are unknown."""
    assert group_of("model.layers.1.mlp.up_proj.weight", "qwen3_moe") == "core"
    for family in ("mixtral", "olmoe"):
        with pytest.raises(PartitionError):
            group_of("model.layers.1.mlp.up_proj.weight", family)
    with pytest.raises(PartitionError, match="family must be one of mixtral, olmoe, qwen3_moe, got 'gpt_oss'"):
        group_of("model.norm.weight", "gpt_oss")


def test_expert_names_round_trip():
    """A fused expert name splits into layer and projection and back; nothing else is one."""
    assert expert_param("model.layers.12.mlp.experts.down_proj") == (12, "down_proj")
    assert (
        expert_name(*expert_param("model.layers.0.mlp.experts.gate_up_proj"))
        == "model.layers.0.mlp.experts.gate_up_proj"
    )
    with pytest.raises(PartitionError, match="not a fused expert"):
        expert_param("model.layers.0.mlp.gate.weight")

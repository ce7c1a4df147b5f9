from __future__ import annotations

import pytest
import torch

from fednested_lib.errors import ConfigError, PartitionError
from tier1.training.model import TINY_MIXTRAL, initial_model


def test_equal_seeds_give_equal_weights(small_mixtral):
    """Guards genesis: version 0 is a function of family, config and seed, and leaves the caller's generator alone."""
    before = torch.random.get_rng_state()
    one, two, other = (initial_model("mixtral", small_mixtral, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_demo_model_has_its_size():
    """Guards the 2 to 6 M parameters and 8 experts that the demo promises."""
    model = initial_model("mixtral", TINY_MIXTRAL, 0)
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    assert model.config.num_local_experts == 8
    assert model.config._experts_implementation == "grouped_mm"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_the_other_families_build(family):
    """Guards that every parameter of each supported family has a partition rule."""
    config = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    extra = {"moe_intermediate_size": 16, "head_dim": 16} if family == "qwen3_moe" else {}
    assert initial_model(family, config | extra, 0).config.model_type == family


@pytest.mark.parametrize(
    ("change", "message"), [({"hiden_size": 64}, "'hiden_size'"), ({"hidden_size": -4}, "makes no mixtral model")]
)
def test_wrong_configs_are_refused(small_mixtral, change, message):
    """Guards that a mistyped key is named instead of being ignored, as transformers would."""
    with pytest.raises(ConfigError, match=message):
        initial_model("mixtral", small_mixtral | change, 0)


def test_unknown_families_are_refused():
    """Guards that a family without partition rules is never built."""
    with pytest.raises(PartitionError, match="'llama'"):
        initial_model("llama", {}, 0)

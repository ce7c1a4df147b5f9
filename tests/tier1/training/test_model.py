from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from fednested_lib.errors import ConfigError, DataError, PartitionError
from tier1.training.model import TINY_MIXTRAL, initial_model, pretrained_model, pretrained_tokenizer
from tier1.training.tokenizer import train_tokenizer


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


SHAPES = {
    "mixtral": {"intermediate_size": 16, "num_local_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 16, "head_dim": 16, "num_experts": 4},
    "olmoe": {"intermediate_size": 16, "num_experts": 4},
}


def saved(directory, family, **changes):
    """Save a small model as an open one is found on a disk, its tokenizer beside it."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    config = {"vocab_size": 300, "hidden_size": 32, **heads, **SHAPES[family], **changes}
    model = initial_model(family, config, 5)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes(train_tokenizer([f"Fox {i} and dog {i * i}." for i in range(200)], 280))
    return model


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_a_saved_model_is_loaded_under_its_names_in_memory(tmp_path, family):
    """Guards genesis from an open model: each expert has its own names on the disk, here they are fused."""
    model = saved(tmp_path, family)
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert not any("gate_up_proj" in name for name in file.keys())  # noqa: SIM118 (not a dict)
    before, after = model.state_dict(), pretrained_model(tmp_path, family).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert pretrained_tokenizer(tmp_path, 300) == (tmp_path / "tokenizer.json").read_bytes()


def test_what_is_no_supported_model_is_refused_by_what_it_is(tmp_path):
    """Guards the messages: no model, a family without rules, another family, missing or torn weights."""
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        pretrained_model(tmp_path / "nothing", "mixtral")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PartitionError, match="'llama'"):
        pretrained_model(tmp_path, "mixtral")
    saved(tmp_path, "olmoe")
    with pytest.raises(ConfigError, match="is of family olmoe, model.family says mixtral"):
        pretrained_model(tmp_path, "mixtral")
    weights = next(tmp_path.glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be loaded .* copy the model again"):
        pretrained_model(tmp_path, "olmoe")
    weights.unlink()
    with pytest.raises(DataError, match="copy the model again"):
        pretrained_model(tmp_path, "olmoe")


def test_weights_of_another_shape_are_not_replaced_by_random_ones(tmp_path):
    """Guards against what transformers does in silence: a layer more than the file has would be random."""
    saved(tmp_path, "mixtral")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(DataError, match=r"does not have the weights of its config\.json"):
        pretrained_model(tmp_path, "mixtral")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """Guards that no text becomes tokens that the model does not have."""
    saved(tmp_path, "mixtral")
    with pytest.raises(ConfigError, match="must have at most the model's 270 tokens, got 280"):
        pretrained_tokenizer(tmp_path, 270)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        pretrained_tokenizer(tmp_path, 300)

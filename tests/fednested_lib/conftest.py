"""Tiny random models of every family, and a tokenizer, for the device tests."""

from __future__ import annotations

import pytest


def _config(family: str, *, experts: int = 6, tied: bool = False):
    from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if family == "mixtral":
        return MixtralConfig(num_local_experts=experts, **shape)
    if family == "olmoe":
        return OlmoeConfig(num_experts=experts, attention_bias=True, **shape)
    # One dense layer between two sparse ones, a layout only this family has.
    return Qwen3MoeConfig(
        num_experts=experts,
        moe_intermediate_size=24,
        head_dim=8,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        attention_bias=True,
        **shape,
    )


@pytest.fixture(params=["mixtral", "qwen3_moe", "olmoe"])
def family(request) -> str:
    """Each supported model family in turn."""
    return request.param


@pytest.fixture
def make_model():
    """Build a random tiny model: make_model(family, seed=0, experts=6, tied=False)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)

    def make(family: str, *, seed: int = 0, experts: int = 6, tied: bool = False):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(family, experts=experts, tied=tied)).eval()
        # The default initialisation (0.02) routes almost by chance and hides errors behind tiny outputs.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    return make

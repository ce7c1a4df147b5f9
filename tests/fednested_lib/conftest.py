"""Tiny random models of every family, and a tokenizer, for the device tests."""

from __future__ import annotations

import pytest


def _config(family: str, *, experts: int = 6, tied: bool = False, vocabulary: int = 96):
    from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

    shape = {
        "vocab_size": vocabulary,
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
    """Build a random tiny model: make_model(family, seed=0, experts=6, tied=False, vocabulary=96)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)

    def make(family: str, *, seed: int = 0, **shape):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(family, **shape)).eval()
        # The default initialisation (0.02) routes almost by chance and hides errors behind tiny outputs.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    """A byte-level tokenizer of at most 300 tokens with an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    return made.to_str().encode()

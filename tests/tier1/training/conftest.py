from __future__ import annotations

import json

import pytest

from tier1.training.tokenizer import train_tokenizer

SMALL_MIXTRAL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
TEXTS = [f"The fox number {i} jumps over {i * 7} lazy dogs, and the dogs sleep on." for i in range(60)]


@pytest.fixture(scope="session")
def small_mixtral():
    return dict(SMALL_MIXTRAL)


@pytest.fixture(scope="session")
def texts():
    return list(TEXTS)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write

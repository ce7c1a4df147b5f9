from __future__ import annotations

import pytest

from fednested_lib.errors import ConfigError, DataError
from fednested_lib.text import end_of_text_id, load_tokenizer
from tier1.training.tokenizer import train_tokenizer


def test_equal_texts_give_equal_bytes(texts, tokenizer):
    """Guards that the tokenizer, which every snapshot's digest contains, is a function of the text."""
    assert train_tokenizer(iter(texts), 300) == tokenizer
    assert train_tokenizer(texts[:30], 290) != tokenizer


def test_any_text_survives_the_round_trip(tokenizer):
    """Guards that device text with characters that tier 1 never saw still encodes and decodes exactly."""
    encoder = load_tokenizer(tokenizer)
    for text in ("Ünïcödé ✓ 🦊", " two  spaces\n\ttab", "\x00"):
        assert encoder.decode(encoder.encode(text).ids) == text


def test_size_and_end_of_text_are_as_declared(tokenizer):
    """Guards the agreement with the model config: ids below the vocabulary size, end of text is token 0."""
    encoder = load_tokenizer(tokenizer)
    assert encoder.get_vocab_size() == 300
    assert end_of_text_id(encoder) == 0


def test_impossible_sizes_are_refused(texts):
    """Guards that a vocabulary that cannot be, or that the text cannot fill, is named with its bound."""
    with pytest.raises(ConfigError, match="at least 257, got 256"):
        train_tokenizer(texts, 256)
    with pytest.raises(DataError, match="asks for 5000"):
        train_tokenizer(texts, 5000)

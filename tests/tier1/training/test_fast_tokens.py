"""Tests of encoding many texts at once: the ids of `tokenizers`, whatever the text."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from tier1.training import fast_tokens
from tier1.training.fast_tokens import FastEncoder
from tier1.training.tokenizer import train_tokenizer

# What the expression looks at, and what the arrays do not know: accents, other scripts, wide white space, NUL.
SYMBOLS = [*"aZ09'.,_- \n\t\r\x0b", " ", " ", "'", "s", "t", "ll", "re", "ve", "d", "abcdefgh", "ijklmnopqrs", " " * 17]
SYMBOLS += ["é", "ß", "слово", "漢", "\u00a0", "\u3000", "½", "²", "\x00", "\x1c", "\x7f", "😀", "e\u0301", "\u0301"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def asked(encoder, texts):
    """Return the stream as `tokenizers` makes it, text by text."""
    encodings = encoder._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [token for one in encodings for token in (*one.ids, encoder.end)]


def noise(seed, n=300):
    rng = random.Random(seed)
    return ["".join(rng.choices(SYMBOLS, k=rng.randrange(40))) for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    """One that has merged what a wrong cut would put together or take apart."""
    return train_tokenizer(noise(11, 4000), 2500)


@pytest.fixture
def encoder(tokenizer):
    return FastEncoder(tokenizer)


@pytest.mark.parametrize("seed", range(4))
def test_random_text_has_the_ids_of_tokenizers(encoder, seed):
    """Guards every rule of the cut: runs, spaces, contractions, ends of texts, bytes the arrays do not know."""
    texts = noise(seed)
    stream = encoder.encode(texts)
    assert stream.dtype == np.int32
    assert stream.tolist() == asked(encoder, texts)
    assert encoder.encode(texts[::-1]).tolist() == asked(encoder, texts[::-1])  # now that every word is known


@pytest.mark.parametrize(
    "text",
    [
        "",
        "'",
        "it's we'll they're I've I'd I'm don't 'tis 'sup 'll'll ''s 'S .'s 's's",
        "a  b   c\n\n d \n",
        "  ",
        " \n",
        "x" * 100 + " " * 100 + "y",
        "'" + "l" * 40,
        "end'",
        "end'l",
        "na\u00efve caf\u00e9 's \u00e9's",
        "\u4e16\u754c" * 30 + " x",
        "<|endoftext|>",
        "a <|endoftext|> b",
    ],
)
def test_the_ends_of_each_rule(encoder, text):
    """Guards single cases, as the first, the last and the only text of a batch."""
    for texts in ([text], [text, "a b"], ["a b", text]):
        assert encoder.encode(texts).tolist() == asked(encoder, texts)


def test_no_text_is_no_token(encoder):
    """Guards the empty batch."""
    assert encoder.encode([]).shape == (0,)


def test_words_that_share_a_slot_are_told_apart(tokenizer, monkeypatch):
    """Guards probing: in a table of 2,048 slots most words do not sit in their own."""
    monkeypatch.setattr(fast_tokens, "_SLOT_BITS", 11)
    encoder, texts = FastEncoder(tokenizer), [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(676)] * 2
    assert encoder.encode(texts).tolist() == asked(encoder, texts)


def test_words_of_one_hash_are_told_apart(tokenizer, monkeypatch):
    """Guards exactness: were all hashes equal, the ids would be the same."""
    monkeypatch.setattr(fast_tokens, "_mixed", lambda keys: np.zeros(keys.shape[1], dtype=np.uint64))
    encoder, texts = FastEncoder(tokenizer), [*noise(7, 5), "abcdefghij abcdefghik abcdefgh abcdefg"]
    assert encoder.encode(texts).tolist() == asked(encoder, texts)


def test_what_is_known_is_bounded(tokenizer, monkeypatch):
    """Guards memory: beyond a number of words the encoder begins anew, with the same ids."""
    monkeypatch.setattr(fast_tokens, "MAX_WORDS", 50)
    encoder = FastEncoder(tokenizer)
    for seed in range(4):
        texts = noise(seed, 20)
        assert encoder.encode(texts).tolist() == asked(encoder, texts)
    assert len(encoder._known) < 4 * 50 * 4


def _changed(tokenizer, **changes):
    return json.dumps({**json.loads(tokenizer), **changes}).encode()


@pytest.mark.parametrize(
    ("changes", "fast"),
    [
        ({}, True),
        ({"normalizer": {"type": "NFC"}}, True),
        ({"normalizer": {"type": "Lowercase"}}, False),
        (
            {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
            False,
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                }
            },
            False,
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, False),
    ],
)
def test_other_tokenizers_are_asked_for_every_text(tokenizer, changes, fast):
    """Guards that a tokenizer with other rules keeps its ids, and that those with ours are the fast ones."""
    encoder, texts = FastEncoder(_changed(tokenizer, **changes)), noise(5)
    assert (encoder._known is not None) is fast
    assert encoder.encode(texts).tolist() == asked(encoder, texts)


def test_a_text_with_more_words_than_slots_ends(tokenizer, monkeypatch):
    """Guards that one huge text does not fill the table, in which a search would never end."""
    monkeypatch.setattr(fast_tokens, "_SLOT_BITS", 8)
    monkeypatch.setattr(fast_tokens, "_PIECE_CHARS", 500)
    encoder, texts = FastEncoder(tokenizer), ["ab", " ".join(map(str, range(1000, 1400)))]
    assert encoder.encode(texts).tolist() == asked(encoder, texts)


@pytest.mark.parametrize("kind", [BYTE_LEVEL, {"type": "Whitespace"}])
def test_what_a_tokenizer_asks_for_batches_is_left_out(tokenizer, kind):
    """Guards against padding tokens within words and against texts cut off, which its file may ask for."""
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    plain, texts = _changed(tokenizer, pre_tokenizer=kind), noise(9, 50)
    asking = _changed(tokenizer, pre_tokenizer=kind, truncation=cut, padding=pad)
    assert FastEncoder(asking).encode(texts).tolist() == FastEncoder(plain).encode(texts).tolist()

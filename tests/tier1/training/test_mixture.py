"""Datasets with weights: their shares from the first row on, their rows in turn, and today's order without weights."""

from __future__ import annotations

from fractions import Fraction
from itertools import islice

import numpy as np
import pytest

from fednested_lib.errors import DataError
from fednested_lib.text import end_of_text_id, load_tokenizer
from tier1.training.data import prepare_dataset, rows_of_sources
from tier1.training.mixture import mixed_rows, turns
from tier1.training.settings import TrainSettings
from tier1.training.trainer import batches

SOURCES = {"a": range(7), "b": range(7, 60), "c": range(60, 63)}


def chosen(n_rows=63, sources=SOURCES, **changes):
    run = TrainSettings(**{"steps": 50, "batch_size": 6, "mixture": {"a": 0.2, "b": 0.7, "c": 0.1}, **changes})
    return np.concatenate(list(batches(n_rows, run, sources))).tolist()


def test_shares_follow_the_weights_from_the_first_turn_on():
    """Guards the bound: after any number of turns every dataset has its share, give or take less than one.

    Of the hundred weightings some have twelve datasets, where picking the one that is furthest behind would break it.
    """
    rng = np.random.default_rng(0)
    weightings = [10 ** rng.uniform(-3, 2, size=rng.integers(1, 13)) for _ in range(100)]
    for weights in [[0.7, 0.2, 0.1], [1.0], [1.0, 1.0, 1.0], *map(list, weightings)]:
        parts = [int(Fraction(weight) * 2**80) for weight in weights]  # exact: the smallest is above 2⁻¹⁰
        count = [0] * len(weights)
        for n, turn in enumerate(islice(turns(weights), 300), start=1):
            count[turn] += 1
            assert all(abs(c * sum(parts) - n * part) < sum(parts) for c, part in zip(count, parts, strict=True))


def test_turns_come_round():
    """Guards that nothing adds up: of every ten rows seven, two and one, however many were drawn before."""
    drawn = list(islice(turns([0.7, 0.2, 0.1]), 1000))
    assert {tuple(np.bincount(drawn[n : n + 10])) for n in range(0, 1000, 10)} == {(7, 2, 1)}


def test_each_dataset_goes_round_before_a_row_comes_again():
    """Guards that a small dataset with a large weight repeats evenly, and that its rounds are not alike."""
    rows = chosen()
    for source in SOURCES.values():
        own = [row for row in rows if row in source]
        rounds = [own[n : n + len(source)] for n in range(0, len(own) - len(source), len(source))]
        assert all(sorted(one) == list(source) for one in rounds)
        assert len(rounds) < 2 or rounds[0] != rounds[1]


def test_the_order_follows_from_the_seed_and_goes_on():
    """Guards exact resume: a longer run begins with the rows of a shorter one; another seed has others."""
    assert chosen(last_step=20) == chosen()[: 20 * 6]
    assert chosen(seed=1) != chosen() == chosen()
    assert [next(n for n, s in enumerate(SOURCES.values()) if row in s) for row in chosen(seed=1)] == [
        next(n for n, s in enumerate(SOURCES.values()) if row in s) for row in chosen()
    ], "whose turn it is does not depend on the seed"


def test_without_a_mixture_the_order_is_that_of_before():
    """Guards runs and figures that exist: one permutation of all rows after another, from Philox of the seed."""
    rng = np.random.Generator(np.random.Philox(3))
    assert chosen(mixture=None, seed=3) == np.concatenate([rng.permutation(63) for _ in range(5)])[:300].tolist()


def test_a_dataset_without_a_row_is_refused():
    """Guards against a weight that nothing can follow: the dataset is named, with the remedy, before any step."""
    with pytest.raises(DataError, match=r"dataset c of core\.mixture must have at least 1 packed row, got 0"):
        mixed_rows({"a": 1, "c": 2}, {"a": range(3), "c": range(3, 3)}, 0)


def test_a_row_is_of_the_dataset_that_has_most_of_it():
    """Guards the ranges: they follow each other, cover all rows, and a shared row is of whoever has more of it."""
    assert rows_of_sources({"a": 17, "b": 33}, 8, 4) == {"a": [0, 2], "b": [2, 4]}
    assert rows_of_sources({"a": 20, "b": 33}, 8, 4) == {"a": [0, 2], "b": [2, 4]}  # 3 of row 2's tokens are a's
    assert rows_of_sources({"a": 22, "b": 33}, 8, 4) == {"a": [0, 3], "b": [3, 4]}  # 5 are
    assert rows_of_sources({"a": 2, "b": 4, "c": 17}, 8, 2) == {"a": [0, 0], "b": [0, 0], "c": [0, 2]}


def test_the_rows_of_a_packed_dataset_are_known(tmp_path, write_jsonl, tokenizer):
    """Guards that packing says whose rows are whose, and again from its cache."""
    texts = {"second": [{"text": "y" * 40}] * 40, "first": [{"text": "x" * 40}] * 20}
    given = {name: write_jsonl(f"{name}.jsonl", rows) for name, rows in texts.items()}
    pack = lambda: prepare_dataset(given, tokenizer, seq_len=16, out_dir=tmp_path / "out")  # noqa: E731
    packed = pack()
    assert list(packed.sources) == ["first", "second"]
    assert packed.sources["first"].stop == packed.sources["second"].start
    assert packed.sources["second"].stop == packed.n_rows
    first, second = (set(packed.tokens()[rows][1:-1].flatten().tolist()) for rows in packed.sources.values())
    assert first & second == {end_of_text_id(load_tokenizer(tokenizer))}
    assert pack() == packed

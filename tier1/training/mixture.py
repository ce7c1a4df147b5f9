"""Which row comes next where datasets have weights: the share of each follows its weight from the first row on.

    |c_i(n) − n·w_i| < 1    for every dataset i and every n: c_i(n) of the first n rows are of i,  Σ w_i = 1

The (c+1)-th row of dataset i may come once n·w_i > c and has to come by n = ⌈(c+1)/w_i⌉; of those that may, the one
that has to come first does. This keeps the bound (earliest deadline first over the windows of proportionate progress:
Baruah et al., Algorithmica 15, 1996), in whole numbers, so that no rounding adds up. Within a dataset no row comes
again before all have come: one permutation after another. The order is a function of weights, rows and seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np

from fednested_lib.errors import DataError


def mixed_rows(weights: Mapping[str, float], sources: Mapping[str, range], seed: int) -> Iterator[int]:
    """Yield row numbers for ever.

    Args:
        weights: Dataset name → its weight, > 0; relative to their sum.
        sources: Dataset name → its rows.
        seed: Of the permutations.

    Returns:
        An iterator without end.

    Raises:
        DataError: A dataset that has a weight has no row.
    """
    names = sorted(weights)
    for name in names:
        if not sources.get(name):
            raise DataError(
                f"dataset {name} of core.mixture must have at least 1 packed row, got 0: give it more text, lower "
                "core.seq_len or take it out"
            )
    rows = [_cycled(sources[name], np.random.SeedSequence([seed, i])) for i, name in enumerate(names)]
    return (next(rows[i]) for i in turns([weights[name] for name in names]))


def turns(weights: list[float]) -> Iterator[int]:
    """Yield for ever whose turn it is: after n turns i has had n·w_i of them, give or take less than one.

    Args:
        weights: > 0, relative to their sum.

    Returns:
        Indices of ``weights``, an iterator without end.
    """
    exact = [Fraction(weight) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    whole, n, count = sum(parts), 0, [0] * len(parts)
    while True:
        n += 1
        ready = [i for i, part in enumerate(parts) if count[i] * whole < n * part]
        turn = min(ready, key=lambda i: -(-(count[i] + 1) * whole // parts[i]))
        count[turn] += 1
        yield turn


def _cycled(rows: range, seed: np.random.SeedSequence) -> Iterator[int]:
    rng = np.random.Generator(np.random.Philox(seed))
    while True:
        yield from (rows.start + int(row) for row in rng.permutation(len(rows)))

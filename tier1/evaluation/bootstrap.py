"""How sure a mean over a suite's rows is: the percentile bootstrap (Efron 1979, Annals of Statistics 7(1)).

    x* = mean of n rows drawn with replacement, B times;      interval = the 2.5 % and 97.5 % quantiles of the x*

The change from one model to another is resampled row by row, both models on the same rows (paired), so that what
makes a row hard or easy cancels. A row, not a token, is drawn: tokens of one row depend on each other. The seed is that
of the rows, so that an interval is a function of what was measured.

With few rows the interval is too narrow; the figure `evaluation.coverage` measures by how much at the default of 42.
`evaluation.max_tokens` sets the number of rows.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000
MAX_UNITS = 4096  # more rows than that are drawn in runs of neighbours, which bounds time and memory
QUANTILES = (0.025, 0.975)


def interval(values: np.ndarray, seed: str) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean; None for fewer than two values or one that is not finite.

    Args:
        values: one figure per row, [n].
        seed: hex digits, at least 32 of them; equal seeds draw the same rows.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    totals, sizes = _units(values)
    # Bits of a counter and no method of numpy's Generator: those may change from release to release (NEP 19).
    bits = np.random.Philox(key=int(seed[:32], 16)).random_raw(RESAMPLES * len(totals))
    drawn = (bits % np.uint64(len(totals))).astype(np.int64).reshape(RESAMPLES, -1)
    means = totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, QUANTILES)
    return float(low), float(high)


def _units(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (sum, number of rows) of what is drawn: each row, or runs of neighbours if there are too many."""
    starts = np.unique(np.linspace(0, len(values), min(len(values), MAX_UNITS), endpoint=False).astype(np.int64))
    return np.add.reduceat(values, starts), np.diff(np.append(starts, len(values))).astype(np.float64)

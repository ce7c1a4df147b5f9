"""Coordinate-wise rules, for small numbers of devices: they form the dense updates, a block of rows at a time.

    median         ΔW_agg[p, q] = median_c Σ_{d of c} k_d·ΔW_d[p, q]·p_d/p_c
    trimmed mean   the mean of what is left when the f largest and the f smallest values are dropped

Yin et al. 2018 (arXiv 1803.01498), defs. 1 and 2; the median of an even number is the mean of the middle two. Unlike
the rules over a Gram matrix these cost n dense products per expert and n·rows·d_in·8 bytes, and priors do not weigh:
one device, one voice, however many updates it sends. The mass holds for them as for every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tier1.aggregation.fold import Term, stack

Statistic = Callable[[torch.Tensor], torch.Tensor]  # fp64 [n, rows, d_in] -> [rows, d_in]


def statistic_of(rule: str, options: Mapping[str, Any]) -> Statistic | None:
    """Return the statistic of a dense rule, None for every other."""
    if rule == "coordinate_median":
        return median
    if rule == "trimmed_mean":
        return lambda values: trimmed_mean(values, f=options["f"])
    return None


def median(values: torch.Tensor) -> torch.Tensor:
    """Return the median over the first axis."""
    n, ordered = len(values), values.sort(dim=0).values
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(values: torch.Tensor, *, f: int) -> torch.Tensor:
    """Return the mean over the first axis without the f largest and f smallest values; 2·f < n."""
    return values.sort(dim=0).values[f : len(values) - f].mean(dim=0)


def block_statistic(voices: Sequence[Sequence[Term]], statistic: Statistic) -> Callable[[slice], torch.Tensor]:
    """Return rows → the statistic of n·Σ c·B·A of every device in these rows.

    Args:
        voices: per device, (c, A, B) of its updates with Σ c = k·s·mass/n, as if the rule were the plain mean.
        statistic: over the first axis of [n, rows, d_in].
    """
    factors = [stack(terms) for terms in voices]
    for b, _ in factors:
        b.mul_(len(voices))
    return lambda rows: statistic(torch.stack([b[rows] @ a for b, a in factors]))

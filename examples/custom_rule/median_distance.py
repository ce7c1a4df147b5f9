"""A rule of your own: leave out every update that lies more than `reach` times the usual distance from the others.

    u_i = median_j ‖ΔW_i − ΔW_j‖,    a_i ∝ p_i where u_i ≤ reach · median u,  else 0

A rule is a function (gram, prior, **options) → weights. It sees inner products and distances of the updates of one
expert, already clipped, never weights or data; it returns one weight per update, at least 0, with sum 1. Staleness,
tokens and trust are in `prior`; the mass is applied afterwards, whatever the rule says. It must be a pure function:
replay calls it again and compares.

The package registers it under `fednested.rules` (see pyproject.toml beside this file); then it is configuration:

    aggregation: {rule: median_distance, rule_options: {reach: 2.0}}
"""

from __future__ import annotations

import numpy as np

from tier1.aggregation.gram import Gram
from tier1.aggregation.rules import Bound, Rule


def median_distance(gram: Gram, prior: np.ndarray, *, reach: float = 2.0) -> np.ndarray:
    """Return the weights of n updates."""
    apart = np.sqrt(gram.distance2) + np.diag(np.full(gram.n, np.nan))
    usual = np.nanmedian(apart, axis=1)
    kept = np.where(usual <= reach * np.median(usual), prior, 0.0)
    return kept / kept.sum()


RULE = Rule(
    weights=median_distance,
    min_devices=lambda _options: 3,  # with fewer, the weighted mean of the clipped updates
    options={"reach": Bound(default=2.0, least=1.0, largest=100.0)},
)

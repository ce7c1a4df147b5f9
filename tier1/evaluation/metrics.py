"""What a registry shows of a version's evaluation besides its losses: one number a name.

perplexity.<suite>, accuracy.<suite>, completions.<suite>      and `.low`, `.high`: the ends of the 95 % interval
loss.<suite>.low, loss.<suite>.high                            of the loss, nats per token
experts.dead, experts.overloaded, experts.specialised          number of experts, over all layers and suites
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from tier1.evaluation.bootstrap import interval
from tier1.evaluation.suites import SuiteResult
from tier1.evaluation.utilisation import STANDINGS, expert_use


def metrics_of(measured: Mapping[str, SuiteResult]) -> dict[str, float]:
    """Return the metrics of a version, all finite.

    Args:
        measured: suite → result.
    """
    found = {name: value for suite, result in measured.items() for name, value in _of_suite(suite, result)}
    uses = expert_use({suite: result.routed for suite, result in measured.items()})
    if uses:
        found |= {f"experts.{each}": float(sum(each in use.standing for use in uses)) for each in STANDINGS}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _of_suite(suite: str, result: SuiteResult) -> Iterator[tuple[str, float]]:
    with np.errstate(over="ignore"):
        loss = interval(np.array(result.row_nats), result.rows)
        yield f"perplexity.{suite}", float(np.exp(result.nats_per_token))
        if loss is not None:
            yield from zip((f"loss.{suite}.low", f"loss.{suite}.high"), loss, strict=True)
            ends = np.exp(loss).tolist()
            yield from zip((f"perplexity.{suite}.low", f"perplexity.{suite}.high"), ends, strict=True)
    for name, right in (("accuracy", result.row_hits), ("completions", result.completions)):
        if right:
            yield f"{name}.{suite}", float(np.mean(right))
            ends = interval(np.array(right), result.rows) or ()
            yield from zip((f"{name}.{suite}.low", f"{name}.{suite}.high"), ends, strict=False)

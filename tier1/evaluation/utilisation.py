"""How the routers use the experts: who gets no token, who gets too many, who serves one domain.

    share_se = token slots of suite s in expert e / token slots of s in its layer,      use_e = mean_s share_se

    dead         use_e < 0.1 / E                      a tenth of the even share
    overloaded   use_e > 3 / E                        as the Switch Transformer's balance is 1/E (arXiv 2101.03961)
    specialised  1 − H(p_e) / ln S > 0.25,            p_se = share_se / Σ_s share_se, over S ≥ 2 suites

H is the entropy: 0 is an expert that serves all suites alike, 1 one that serves a single suite; 0.25 of two suites is
four fifths of it in one of them. With k experts a token no share exceeds 1/k, so that of E ≤ 3·k none is overloaded.
Every suite counts the same, whatever its length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

DEAD, OVERLOADED, SPECIALISED = 0.1, 3.0, 0.25
STANDINGS = ("dead", "overloaded", "specialised")


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """One expert of one layer.

    Args:
        layer: its layer.
        expert: its number there.
        load: mean share over the suites, of the even share 1/E; 1 is balanced.
        specialisation: 1 − normalised entropy over the suites, 0..1; 0 for a single suite or an unused expert.
        shares: suite → share of its token slots, 0..1.
        standing: some of `STANDINGS`.
    """

    layer: int
    expert: int
    load: float
    specialisation: float
    shares: dict[str, float]
    standing: tuple[str, ...]

    @property
    def name(self) -> str:
        """As the data engine names it."""
        return f"l{self.layer}.e{self.expert}"


def expert_use(routed: Mapping[str, Mapping[str, list[int]]]) -> list[ExpertUse]:
    """Return the use of every expert; what stands out comes first, dead ones before all, then by layer and number.

    Args:
        routed: suite → layer → token slots of each expert; suites without routing are left out.
    """
    suites = sorted(suite for suite, layers in routed.items() if layers)
    layers = sorted({int(layer) for suite in suites for layer in routed[suite]})
    found = [use for layer in layers for use in _layer(layer, {suite: routed[suite][str(layer)] for suite in suites})]
    return sorted(found, key=lambda use: [standing not in use.standing for standing in STANDINGS])


def _layer(layer: int, counts: Mapping[str, list[int]]) -> list[ExpertUse]:
    slots = np.array(list(counts.values()), dtype=np.float64)
    shares_se = slots / slots.sum(axis=1, keepdims=True)
    load = shares_se.mean(axis=0) * slots.shape[1]
    special = _specialisation(shares_se)
    return [
        ExpertUse(
            layer=layer,
            expert=expert,
            load=float(load[expert]),
            specialisation=float(special[expert]),
            shares=dict(zip(counts, shares_se[:, expert].tolist(), strict=True)),
            standing=_standing(load[expert], special[expert]),
        )
        for expert in range(slots.shape[1])
    ]


def _specialisation(shares_se: np.ndarray) -> np.ndarray:
    n_suites, used = len(shares_se), shares_se.sum(axis=0) > 0
    if n_suites < 2:
        return np.zeros(shares_se.shape[1])
    p = np.where(used, shares_se, 1.0) / np.where(used, shares_se.sum(axis=0), n_suites)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=0)
    return np.clip(1.0 - entropy / np.log(n_suites), 0.0, 1.0)


def _standing(load: float, specialisation: float) -> tuple[str, ...]:
    holds = (load < DEAD, load > OVERLOADED, load >= DEAD and specialisation > SPECIALISED)
    return tuple(name for name, is_so in zip(STANDINGS, holds, strict=True) if is_so)

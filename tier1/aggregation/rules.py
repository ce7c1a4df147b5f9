"""Robust rules: functions from a Gram matrix and priors to weights.

    a = rule(G, p),    a_d ≥ 0,    Σ_d a_d = 1          (FLTrust: each update at the root's norm instead)

The aggregate is Σ_d a_d·ΔW_d. A rule sees neither weights nor factors: distances and cosines, which are all that these
need, are in the Gram matrix. When which is right:

    weighted_mean      nobody is hostile; the least variance
    krum, multi_krum   at most f hostile of n ≥ 2f + 3     Blanchard et al. 2017, arXiv 1703.02757
    geometric_median   fewer than half of the weight hostile, alike     Pillutla et al. 2022, arXiv 1912.13445
    centred_clipping   keeps more of updates that differ honestly     Karimireddy et al. 2021, arXiv 2012.10333
    fltrust            a trusted direction exists          Cao et al. 2021, arXiv 2012.13995
    foolsgold          many identities, one will           Fung et al. 2020, arXiv 1808.04866, on this buffer's updates

`coordinate_median` and `trimmed_mean` (Yin et al. 2018, arXiv 1803.01498) are no function of a Gram matrix: they form
dense blocks expert by expert (`coordinate.py`) and are for small numbers of devices; here stand their names and bounds.

Below its minimum number of devices a rule is replaced by the weighted mean of the clipped updates: two devices have no
majority. Ties are broken by the canonical order of updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tier1.aggregation.gram import Gram, distance2_to

Weights = Callable[..., np.ndarray]  # (gram, prior, **options) -> a
TINY = 1e-300


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What an option may be: its default, least and largest value; integers where `whole`."""

    default: float | int | None
    least: float
    largest: float = math.inf
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule as configuration names it.

    Args:
        weights: (gram, prior fp64 [n], **options) → a fp64 [n]; None for a rule that needs dense blocks.
        min_devices: least number of devices that it decides about, given its options.
        options: option → bound; what is not here is refused at load time.
        needs_gram: whether it reads `gram`; if not, none is computed and it is called with None.
        needs_root: whether it reads `gram.root`; experts without a root get the weighted mean.
        rescales: Σ a need not be 1.
    """

    weights: Weights | None
    min_devices: Callable[[dict[str, Any]], int] = lambda _options: 1
    options: dict[str, Bound] = field(default_factory=dict)
    needs_gram: bool = True
    needs_root: bool = False
    rescales: bool = False

    @property
    def dense(self) -> bool:
        """Whether the rule forms dense blocks."""
        return self.weights is None


def weighted_mean(_gram: Gram | None, prior: Sequence[float]) -> np.ndarray:
    """Return a = p / Σp, the sum correctly rounded."""
    total = math.fsum(prior)
    return np.array([value / total for value in prior])


def krum_scores(gram: Gram, *, f: int) -> np.ndarray:
    """Return Σ of the n − f − 2 smallest D² of each update to another one."""
    others = gram.distance2.copy()
    np.fill_diagonal(others, np.inf)
    return np.sort(others, axis=1)[:, : max(gram.n - f - 2, 1)].sum(axis=1)


def krum(gram: Gram, prior: np.ndarray, *, f: int = 1) -> np.ndarray:
    """Give all weight to the update with the nearest n − f − 2 neighbours (Blanchard et al. 2017, eq. 3)."""
    return multi_krum(gram, prior, f=f, m=1)


def multi_krum(gram: Gram, prior: np.ndarray, *, f: int = 1, m: int | None = None) -> np.ndarray:
    """Average the m updates with the best Krum scores in proportion to their priors; m = n − f by default."""
    kept = np.argsort(krum_scores(gram, f=f), kind="stable")[: min(m or gram.n - f, gram.n)]
    weights = np.zeros(gram.n)
    weights[kept] = prior[kept]
    return weights / weights.sum()


def geometric_median(gram: Gram, prior: np.ndarray, *, iterations: int = 64) -> np.ndarray:
    """Minimise Σ p_i·‖ΔW_i − z‖ over z by Weiszfeld's iteration, z = Σ a_i·ΔW_i from the weighted mean on.

    Distances are floored at 1e-9 of the root mean square distance, so that z may reach an update.
    """
    weights = prior / prior.sum()
    floor = 1e-9 * math.sqrt(max(float(weights @ gram.distance2 @ weights), TINY))
    for _ in range(iterations):
        weights = prior / np.maximum(np.sqrt(distance2_to(gram, weights)), floor)
        weights = weights / weights.sum()
    return weights


def centred_clipping(gram: Gram, prior: np.ndarray, *, radius: float | None = None, iterations: int = 8) -> np.ndarray:
    """Iterate v ← v + Σ q_i·min(1, ρ/‖ΔW_i − v‖)·(ΔW_i − v) from the medoid, q = p/Σp (Karimireddy et al., alg. 2).

    The medoid, the update with the least weighted sum of distances, stands where the paper has the last momentum.
    `radius` ρ defaults to the weighted median distance to it.
    """
    share = prior / prior.sum()
    weights = np.zeros(gram.n)
    weights[int(np.argmin(np.sqrt(gram.distance2) @ share))] = 1.0
    if radius is None:
        radius = _weighted_median(np.sqrt(distance2_to(gram, weights)), share)
    for _ in range(iterations):
        pull = share * np.minimum(1.0, radius / np.maximum(np.sqrt(distance2_to(gram, weights)), TINY))
        weights = (1.0 - pull.sum()) * weights + pull
    return np.maximum(weights, 0.0) / weights.sum()


def fltrust(gram: Gram, prior: np.ndarray) -> np.ndarray:
    """Return ReLU(cos(ΔW_i, g_0))·p_i, normalised, times ‖g_0‖/‖ΔW_i‖ (Cao et al. 2021, eqs. 2 to 4).

    Every update counts with the root's norm, so Σ a is 1 only where all norms are equal. Nobody agrees with the root:
    zero weights, and the expert stays as it is.
    """
    assert gram.root is not None, "the pipeline falls back where there is no root"
    norms, length = gram.norms, math.sqrt(max(gram.root.norm2, 0.0))
    cosines = gram.root.inner / np.maximum(norms * length, TINY)
    trust = prior * np.clip(cosines, 0.0, 1.0)
    if trust.sum() <= 0.0:
        return np.zeros(gram.n)
    return np.where(trust > 0, trust / trust.sum() * length / np.maximum(norms, TINY), 0.0)


def foolsgold(gram: Gram, prior: np.ndarray) -> np.ndarray:
    """Weigh down updates that are more alike than honest ones are (Fung et al. 2020, alg. 1).

    It takes likeness for guilt: against many identities of one attacker among devices whose data differ, not against a
    lone attacker, who is unlike everybody.

    In terms of u = 1 − v and 1 − cos, which keep their digits where updates are near-equal. If all are alike, nobody is
    singled out: the weighted mean.
    """
    apart = _one_minus_cosine(gram)
    np.fill_diagonal(apart, np.inf)
    nearest = apart.min(axis=1)  # u_i = 1 − max_j cos_ij
    np.fill_diagonal(apart, 0.0)
    pardon = np.maximum(nearest[:, None] - nearest[None, :], 0.0) / np.maximum(1.0 - nearest[None, :], TINY)
    pardon = np.minimum(pardon, 1.0)  # 1 − v_i/v_j where v_j > v_i, else 0
    apart = np.where(apart < 1.0, apart + pardon - apart * pardon, apart)  # a negative cosine is no likeness
    np.fill_diagonal(apart, np.inf)
    share = np.clip(apart.min(axis=1), 0.0, 1.0)
    if share.max() <= 0.0:
        return weighted_mean(gram, prior)
    share = np.clip(share / share.max(), 0.0, 0.99)
    with np.errstate(divide="ignore"):
        share = np.clip(np.log(share / (1.0 - share)) + 0.5, 0.0, 1.0)
    weights = share * prior
    return weights / weights.sum()


def _one_minus_cosine(gram: Gram) -> np.ndarray:
    """Return 1 − cos = (D² − (‖ΔW_i‖ − ‖ΔW_j‖)²) / (2·‖ΔW_i‖·‖ΔW_j‖); 1 for an update that is zero."""
    norms = gram.norms
    products = 2 * np.outer(norms, norms)
    apart = (gram.distance2 - (norms[:, None] - norms[None, :]) ** 2) / np.maximum(products, TINY)
    return np.where(products > 0, np.clip(apart, 0.0, 2.0), 1.0)


def _weighted_median(values: np.ndarray, share: np.ndarray) -> float:
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(share[order])
    return float(values[order][np.searchsorted(reached, 0.5 * reached[-1])])


_F = Bound(default=1, least=0, largest=100_000, whole=True)

RULES: dict[str, Rule] = {
    "weighted_mean": Rule(weights=weighted_mean, needs_gram=False),
    "krum": Rule(weights=krum, min_devices=lambda options: 2 * options["f"] + 3, options={"f": _F}),
    "multi_krum": Rule(
        weights=multi_krum,
        min_devices=lambda options: 2 * options["f"] + 3,
        options={"f": _F, "m": Bound(default=None, least=1, largest=100_000, whole=True)},
    ),
    "geometric_median": Rule(
        weights=geometric_median,
        min_devices=lambda _options: 3,
        options={"iterations": Bound(default=64, least=1, largest=10_000, whole=True)},
    ),
    "centred_clipping": Rule(
        weights=centred_clipping,
        min_devices=lambda _options: 3,
        options={
            "radius": Bound(default=None, least=1e-12),
            "iterations": Bound(default=8, least=1, largest=10_000, whole=True),
        },
    ),
    "fltrust": Rule(weights=fltrust, needs_root=True, rescales=True),
    "foolsgold": Rule(weights=foolsgold, min_devices=lambda _options: 3),
    "coordinate_median": Rule(weights=None, min_devices=lambda _options: 3, needs_gram=False),
    "trimmed_mean": Rule(
        weights=None,
        min_devices=lambda options: 2 * options["f"] + 1,
        options={"f": _F},
        needs_gram=False,
    ),
}

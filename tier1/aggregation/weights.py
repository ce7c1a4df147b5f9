"""How much of each update goes into an expert: clip, prior, rule, mass (DESIGN §4).

For update d and expert e, with N_{d,e} declared tokens, staleness τ_d and ΔW_d over all experts the update covers:

    k_d     = min(1, C / ‖ΔW_d‖_F)                                     clip
    p_{d,e} = min(N_{d,e}, cap) · (1 + τ_d)^(−exponent)                prior
    a_{·,e} = rule(p_{·,e}),  Σ_d a_{d,e} = 1                          rule; weighted mean: a = p / Σp
    mass_e  = min(1, n_e / k_min) · Σ_d p_{d,e} / max(Σ_d min(N_{d,e}, cap), m_min)
    ω_{d,e} = k_d · a_{d,e} · mass_e

The rule normalises; the mass puts back what that erases: a uniformly stale buffer takes a smaller step (FedBuff, Nguyen
et al. 2022, arXiv 2106.06639), a lone device with few tokens does not own an expert. A fresh update counts in full:
(1 + 0)^(−½) = 1, where a version counter that is incremented too early would give less.

An expert with zero declared tokens is one the device withheld; it is not in n_e and has no weight. Sums are correctly
rounded (`math.fsum`), so that no order of arrival shows in the last bit. A rule maps priors to weights that sum to 1;
`RULES` is where others are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tier1.versions.manifest import AggregationSettings

Rule = Callable[[Sequence[float]], list[float]]
Expert = tuple[int, int]  # (layer, expert id)


def clip_factor(norm: float, max_norm: float) -> float:
    """Return k_d, the factor in (0, 1] that brings an update of Frobenius norm `norm` below `max_norm`."""
    return 1.0 if norm <= max_norm else max_norm / norm


def prior(tokens: int, staleness: int, *, token_cap: int, exponent: float) -> float:
    """Return p_{d,e} from the declared tokens of one expert and the staleness of the update in heads."""
    return min(tokens, token_cap) * (1.0 + staleness) ** -exponent


def weighted_mean(priors: Sequence[float]) -> list[float]:
    """Return a = p / Σp."""
    total = math.fsum(priors)
    return [value / total for value in priors]


RULES: dict[str, Rule] = {"weighted_mean": weighted_mean}


def mass(tokens: Sequence[int], priors: Sequence[float], settings: AggregationSettings) -> float:
    """Return mass_e in [0, 1] of one expert over the updates that cover it."""
    coverage = min(1.0, len(tokens) / settings.min_coverage)
    capped = sum(min(count, settings.token_cap) for count in tokens)
    return coverage * math.fsum(priors) / max(capped, settings.min_mass_tokens)


def weigh(
    tokens: Sequence[Mapping[Expert, int]],
    stalenesses: Sequence[int],
    clips: Sequence[float],
    settings: AggregationSettings,
) -> list[dict[Expert, float]]:
    """Weigh updates against each other, expert by expert.

    Args:
        tokens: per update, declared tokens of every (layer, expert) it adapted.
        stalenesses: per update, heads between its base and the parent of the fold, ≥ 0.
        clips: per update, k_d.
        settings: bounds of prior and mass, and the rule.

    Returns:
        Per update, ω of every (layer, expert) it covers; experts with zero tokens are absent.
    """
    weights: list[dict[Expert, float]] = [{} for _ in tokens]
    for expert in sorted({expert for update in tokens for expert in update}):
        covering = [i for i, update in enumerate(tokens) if update.get(expert, 0) > 0]
        if not covering:
            continue
        counts = [tokens[i][expert] for i in covering]
        priors = [
            prior(count, stalenesses[i], token_cap=settings.token_cap, exponent=settings.staleness_exponent)
            for i, count in zip(covering, counts, strict=True)
        ]
        step = mass(counts, priors, settings)
        for i, share in zip(covering, RULES[settings.rule](priors), strict=True):
            weights[i][expert] = clips[i] * share * step
    return weights

"""How much of each update goes into an expert: clip, prior, rule, mass (DESIGN §4).

For update d of client c(d) and expert e, with N_{d,e} declared tokens, staleness τ_d and ΔW_d over all experts the
update covers; sums over c(d) run over all updates of the same client in the cut:

    k_d     = min(1, C / √(Σ_{c(d)} ‖ΔW‖²_F))                          clip
    t_{d,e} = N_{d,e} · min(1, cap / Σ_{c(d)} N_{·,e})                 tokens that count
    p_{d,e} = t_{d,e} · (1 + τ_d)^(−exponent)                          prior
    a_{·,e} = rule(p_{·,e}),  Σ_d a_{d,e} = 1                          rule; weighted mean: a = p / Σp
    mass_e  = min(1, n_e / k_min) · Σ_d p_{d,e} / max(Σ_d t_{d,e}, m_min)
    ω_{d,e} = k_d · a_{d,e} · mass_e

The bounds are a device's, not an update's: C, the cap and the place in n_e (distinct clients that cover e) are shared
by the updates of one client, so that sending its data in five parts gains it nothing. With one update per client
k_d = min(1, C / ‖ΔW_d‖_F) and t_{d,e} = min(N_{d,e}, cap).

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


def clip_factors(clients: Sequence[str], norms: Sequence[float], max_norm: float) -> list[float]:
    """Return k_d per update: all updates of a client get the factor of their joint norm."""
    joint = {
        client: _joint_norm([norm for other, norm in zip(clients, norms, strict=True) if other == client])
        for client in set(clients)
    }
    return [clip_factor(joint[client], max_norm) for client in clients]


def _joint_norm(norms: Sequence[float]) -> float:
    """Return √Σ‖·‖², scaled by the largest so that no square overflows; of one norm, that norm to the bit."""
    largest = max(norms)
    return largest * math.sqrt(math.fsum((norm / largest) ** 2 for norm in norms)) if largest > 0 else 0.0


def counted_tokens(clients: Sequence[str], tokens: Sequence[int], token_cap: int) -> list[float]:
    """Return t_{d,e} of one expert: a client above the cap shares it among its updates in proportion."""
    totals = _totals(clients, tokens)
    return [
        count if totals[client] <= token_cap else count * token_cap / totals[client]
        for client, count in zip(clients, tokens, strict=True)
    ]


def _totals(clients: Sequence[str], tokens: Sequence[int]) -> dict[str, int]:
    totals = dict.fromkeys(clients, 0)
    for client, count in zip(clients, tokens, strict=True):
        totals[client] += count
    return totals


def prior(tokens: float, staleness: int, *, exponent: float) -> float:
    """Return p_{d,e} from the tokens that count and the staleness of the update in heads."""
    return tokens * (1.0 + staleness) ** -exponent


def weighted_mean(priors: Sequence[float]) -> list[float]:
    """Return a = p / Σp."""
    total = math.fsum(priors)
    return [value / total for value in priors]


RULES: dict[str, Rule] = {"weighted_mean": weighted_mean}


def mass(
    clients: Sequence[str], tokens: Sequence[int], priors: Sequence[float], settings: AggregationSettings
) -> float:
    """Return mass_e in [0, 1] of one expert over the updates that cover it."""
    totals = _totals(clients, tokens)
    coverage = min(1.0, len(totals) / settings.min_coverage)
    capped = sum(min(total, settings.token_cap) for total in totals.values())
    return coverage * math.fsum(priors) / max(capped, settings.min_mass_tokens)


def weigh(
    clients: Sequence[str],
    tokens: Sequence[Mapping[Expert, int]],
    stalenesses: Sequence[int],
    clips: Sequence[float],
    settings: AggregationSettings,
) -> list[dict[Expert, float]]:
    """Weigh updates against each other, expert by expert.

    Args:
        clients: per update, the device that sent it.
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
        owners, counts = [clients[i] for i in covering], [tokens[i][expert] for i in covering]
        priors = [
            prior(count, stalenesses[i], exponent=settings.staleness_exponent)
            for i, count in zip(covering, counted_tokens(owners, counts, settings.token_cap), strict=True)
        ]
        step = mass(owners, counts, priors, settings)
        for i, share in zip(covering, RULES[settings.rule](priors), strict=True):
            weights[i][expert] = clips[i] * share * step
    return weights

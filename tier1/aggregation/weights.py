"""How much of each update goes into an expert: clip, prior, rule, mass (DESIGN §4).

For update d of client c(d) and expert e, with N_{d,e} declared tokens, staleness τ_d and ΔW_d over all experts the
update covers; sums over c(d) run over all updates of the same client in the cut:

    k_d     = min(1, C / √(Σ_{c(d)} ‖ΔW‖²_F))                          clip (optionally per expert too: k_{d,e})
    t_{d,e} = N_{d,e} · min(1, cap_e / Σ_{c(d)} N_{·,e})               tokens that count
    p_{d,e} = t_{d,e} · discount(τ_d) · trust_{c(d)}                   prior
    a_{·,e} = rule(G′_e, p_{·,e}),  Σ_d a_{d,e} = 1,  G′ = k kᵀ ∘ G    rule (`rules.py`); weighted mean: a = p / Σp
    mass_e  = s_e · min(1, n_e / k_min) · Σ_d p_{d,e} / max(Σ_d t_{d,e}, m_min)
    ω_{d,e} = k_d · a_{d,e} · mass_e

The bounds are a device's, not an update's: C, the cap and the place in n_e (distinct clients that cover e) are shared
by the updates of one client, so that sending its data in five parts gains it nothing. With one update per client
k_d = min(1, C / ‖ΔW_d‖_F) and t_{d,e} = min(N_{d,e}, cap). Rules count devices as well: updates of one client are
judged as one, their mean in proportion to their priors, and share the weight it gets in the same proportion.

What is too much can be said in numbers, and in what is usual among the devices of the cut, of which fewer than half
lie:

    u     = med_c(‖ΔW_c‖ / √n_c)                                          n_c: experts that device c covers
    C_c   = min(max_norm, norm_ratio · min(med_c ‖ΔW_c‖, u · √n_c))       of a device, all experts together
    C_e   = min(max_expert_norm, expert_norm_ratio · u)                   of a device, one expert
    cap_e = min(token_cap, token_ratio · med_c(Σ N_{c,e}))                over the devices that cover e
    s_e   = min(1, Σ_c min(Σ N_{c,e}, v) / (mass_ratio · n · v))          v = med_c(Σ_e N_{c,e} / n_c), n devices

med is the lower median, over devices that changed anything, so that of two the louder does not judge itself. Who covers
fewer experts than is usual has their share to spend and no more, who covers more has no more than is usual. s_e: what
hardly anybody saw a token of is hardly moved, however few devices say so together.

The discount is (1 + τ)^(−exponent), a hinge 1/(1 + slope·max(0, τ − delay)) or 1 (Xie et al. 2019, arXiv 1903.03934).
The rule normalises; the mass puts back what that erases, whatever the rule: a uniformly stale buffer takes a smaller
step (FedBuff, Nguyen et al. 2022, arXiv 2106.06639), a lone device with few tokens does not own an expert. A fresh
update counts in full: (1 + 0)^(−½) = 1, where a version counter that is incremented too early would give less.

An expert with zero declared tokens is one the device withheld; it is not in n_e and has no weight. Sums of priors are
correctly rounded (`math.fsum`), so that no order of arrival shows in the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from tier1.aggregation.gram import Gram, distance2_to, own_root
from tier1.aggregation.registry import Chosen, choose
from tier1.aggregation.rules import weighted_mean
from tier1.versions.settings import AggregationSettings

Expert = tuple[int, int]  # (layer, expert id)
Grams = Callable[[Sequence[Expert], Sequence[int]], Gram]  # (experts, indices of updates) -> their Gram, of k·ΔW
TIER1_ROOT = "tier1"


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """What clip, prior, rule and mass made of a buffer.

    Args:
        weights: per update, ω of every (layer, expert) it covers; experts with zero tokens are absent.
        by_block: experts whose rule forms dense blocks; their ω is k·mass/n, n devices, shared by the
            updates of a device.
        cosines: per update, to the aggregate before mass; None where nothing was measured.
        distances: per update, of k·ΔW from the aggregate, likewise.
    """

    weights: list[dict[Expert, float]]
    by_block: frozenset[Expert]
    cosines: list[float | None]
    distances: list[float | None]


def clip_factor(norm: float, max_norm: float) -> float:
    """Return k_d, the factor in (0, 1] that brings an update of Frobenius norm `norm` below `max_norm`."""
    return 1.0 if norm <= max_norm else max_norm / norm


def clip_factors(clients: Sequence[str], norms: Sequence[float], max_norm: float) -> list[float]:
    """Return k_d per update: all updates of a client get the factor of their joint norm."""
    return [clip_factor(length, max_norm) for length in joint_norms(clients, norms)]


def joint_norms(clients: Sequence[str], norms: Sequence[float]) -> list[float]:
    """Return, per update, the joint norm of all updates of its client."""
    joint = {
        client: _joint_norm([norm for other, norm in zip(clients, norms, strict=True) if other == client])
        for client in set(clients)
    }
    return [joint[client] for client in clients]


def _joint_norm(norms: Sequence[float]) -> float:
    """Return √Σ‖·‖², scaled by the largest so that no square overflows; of one norm, that norm to the bit."""
    largest = max(norms)
    return largest * math.sqrt(math.fsum((norm / largest) ** 2 for norm in norms)) if largest > 0 else 0.0


def usual_norms(
    clients: Sequence[str], norms: Sequence[float], tokens: Sequence[Mapping[Expert, int]]
) -> tuple[float, float]:
    """Return med_c ‖ΔW_c‖ and u, lower medians over the devices that changed anything; without any, infinity.

    Args:
        clients: per update, the device that sent it.
        norms: per update, ‖ΔW‖ over the experts it covers.
        tokens: per update, declared tokens per expert; an expert with none is not covered.
    """
    joint, spans = dict(zip(clients, joint_norms(clients, norms), strict=True)), _spans(clients, tokens)
    moved = {client: norm for client, norm in joint.items() if norm > 0}
    if not moved:
        return math.inf, math.inf
    return median_low(moved.values()), median_low(norm / math.sqrt(spans[client]) for client, norm in moved.items())


def device_clips(
    clients: Sequence[str],
    norms: Sequence[float],
    tokens: Sequence[Mapping[Expert, int]],
    settings: AggregationSettings,
) -> list[float]:
    """Return k_d per update: by `max_norm`, then by what is usual in the cut; arguments as of `usual_norms`."""
    clips = clip_factors(clients, norms, settings.max_norm)
    if settings.norm_ratio is None:
        return clips
    clipped = [k * norm for k, norm in zip(clips, norms, strict=True)]
    spans, (whole, usual) = _spans(clients, tokens), usual_norms(clients, clipped, tokens)
    return [
        k * clip_factor(length, settings.norm_ratio * min(whole, usual * math.sqrt(spans[client])))
        for k, length, client in zip(clips, joint_norms(clients, clipped), clients, strict=True)
    ]


def expert_bound(
    clients: Sequence[str],
    norms: Sequence[float],
    tokens: Sequence[Mapping[Expert, int]],
    settings: AggregationSettings,
) -> float | None:
    """Return C_e; None: unbounded. Arguments as of `usual_norms`, norms after `device_clips`."""
    if settings.expert_norm_ratio is None:
        return settings.max_expert_norm
    usual = settings.expert_norm_ratio * usual_norms(clients, norms, tokens)[1]
    return min(usual, settings.max_expert_norm or math.inf)


def _spans(clients: Sequence[str], tokens: Sequence[Mapping[Expert, int]]) -> dict[str, int]:
    """Return how many experts each device covers, at least 1."""
    covered: dict[str, set[Expert]] = {client: set() for client in clients}
    for client, counts in zip(clients, tokens, strict=True):
        covered[client] |= {expert for expert, count in counts.items() if count > 0}
    return {client: max(1, len(experts)) for client, experts in covered.items()}


def token_bound(clients: Sequence[str], tokens: Sequence[int], settings: AggregationSettings) -> float:
    """Return cap_e, the most tokens that a device counts for on one expert."""
    if settings.token_ratio is None:
        return settings.token_cap
    return min(settings.token_cap, settings.token_ratio * median_low(_totals(clients, tokens).values()))


def counted_tokens(clients: Sequence[str], tokens: Sequence[int], token_cap: float) -> list[float]:
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


def discount(staleness: int, settings: AggregationSettings) -> float:
    """Return what staleness in heads leaves of a prior, in (0, 1]; 1 for a fresh update."""
    if settings.staleness == "constant":
        return 1.0
    if settings.staleness == "hinge":
        return 1.0 / (1.0 + settings.hinge_slope * max(0, staleness - settings.hinge_delay))
    return (1.0 + staleness) ** -settings.staleness_exponent


def prior(tokens: float, staleness: int, settings: AggregationSettings, trust: float = 1.0) -> float:
    """Return p_{d,e} from the tokens that count, the update's staleness and the trust in its client."""
    return tokens * discount(staleness, settings) * trust


def mass(
    clients: Sequence[str], tokens: Sequence[int], priors: Sequence[float], settings: AggregationSettings
) -> float:
    """Return mass_e in [0, 1] of one expert over the updates that cover it, before its share s_e of the fleet."""
    totals = _totals(clients, tokens)
    coverage = min(1.0, len(totals) / settings.min_coverage)
    cap = token_bound(clients, tokens, settings)
    capped = sum(min(total, cap) for total in totals.values())
    return coverage * math.fsum(priors) / max(capped, settings.min_mass_tokens)


def usual_tokens(clients: Sequence[str], tokens: Sequence[Mapping[Expert, int]]) -> tuple[float, int]:
    """Return v, the lower median over devices of the tokens that they declare per expert they cover; and n.

    Devices that declare none are not among the n. Without any, (0, 0).
    """
    totals, spans = _totals(clients, [sum(counts.values()) for counts in tokens]), _spans(clients, tokens)
    found = [total / spans[client] for client, total in totals.items() if total > 0]
    return (median_low(found), len(found)) if found else (0.0, 0)


def fleet_share(clients: Sequence[str], tokens: Sequence[int], usual: float, wanted: float) -> float:
    """Return s_e in (0, 1] of one expert.

    Args:
        clients: per update that covers the expert, the device that sent it.
        tokens: per update, declared tokens on it, ≥ 1.
        usual: v, more than which no device counts.
        wanted: mass_ratio · n, how many times v makes a full step.
    """
    counted = math.fsum(min(total, usual) for total in _totals(clients, tokens).values())
    return min(1.0, counted / (wanted * usual))


def weigh(
    clients: Sequence[str],
    tokens: Sequence[Mapping[Expert, int]],
    stalenesses: Sequence[int],
    clips: Sequence[float],
    settings: AggregationSettings,
    *,
    norms: Sequence[float] | None = None,
    trusts: Sequence[float] | None = None,
    grams: Grams | None = None,
) -> Weighing:
    """Weigh updates against each other, expert by expert.

    Args:
        clients: per update, the device that sent it.
        tokens: per update, declared tokens of every (layer, expert) it adapted; in canonical order.
        stalenesses: per update, heads between its base and the parent of the fold, ≥ 0.
        clips: per update, k_d.
        settings: the pipeline.
        norms: per update, ‖ΔW‖ before the clip; needed by `expert_norm_ratio`.
        trusts: per update, trust in its client in [0, 1]; 1 if absent.
        grams: the Gram engine over clipped updates k_d·ΔW_d; needed by rules that compare updates, by bounds per expert
            and of the step, and to measure.

    Raises:
        ConfigError: the rule is unknown, out of bounds, or returned no weights.
    """
    assert norms is not None or settings.expert_norm_ratio is None, "this pipeline compares norms"
    clipped = [k * norm for k, norm in zip(clips, norms or [0.0] * len(clips), strict=True)]
    bound = expert_bound(clients, clipped, tokens, settings)
    usual, n_devices = usual_tokens(clients, tokens)
    chosen, ledger = choose(settings), _Ledger(len(tokens), bound)
    for experts, covering in _units(tokens, settings.scope):
        owners = [clients[i] for i in covering]
        priors, masses = {}, {}
        for expert in experts:
            counts = [tokens[i][expert] for i in covering]
            counted = counted_tokens(owners, counts, token_bound(owners, counts, settings))
            priors[expert] = [
                prior(count, stalenesses[i], settings, 1.0 if trusts is None else trusts[i])
                for i, count in zip(covering, counted, strict=True)
            ]
            masses[expert] = mass(owners, counts, priors[expert], settings)
            if settings.mass_ratio is not None:
                masses[expert] *= fleet_share(owners, counts, usual, settings.mass_ratio * n_devices)
        gram = None
        if needs_gram(settings, chosen):
            assert grams is not None, "this pipeline compares updates"
            gram = grams(experts, covering)
        shared = np.array([math.fsum(priors[expert][row] for expert in experts) for row in range(len(covering))])
        ledger.enter(covering, owners, [clips[i] for i in covering], shared, masses, gram, chosen, settings)
    return ledger.close(settings)


def measures(settings: AggregationSettings, chosen: Chosen) -> bool:
    """Tell whether cosine and distance to the aggregate are recorded."""
    return settings.measure or (settings.reputation is not None and not chosen.rule.dense) or chosen.rule.needs_gram


def needs_gram(settings: AggregationSettings, chosen: Chosen) -> bool:
    """Tell whether this pipeline compares updates at all; the weighted mean with its defaults does not."""
    bounds = (settings.max_expert_norm, settings.expert_norm_ratio, settings.max_step_norm)
    return measures(settings, chosen) or any(bound is not None for bound in bounds)


def _units(tokens: Sequence[Mapping[Expert, int]], scope: str) -> list[tuple[tuple[Expert, ...], tuple[int, ...]]]:
    """Return (experts, indices of the updates that cover them) of everything that is judged together."""
    covering: dict[Expert, tuple[int, ...]] = {}
    for expert in sorted({expert for update in tokens for expert in update}):
        indices = tuple(i for i, update in enumerate(tokens) if update.get(expert, 0) > 0)
        if indices:
            covering[expert] = indices
    if scope == "expert":
        return [((expert,), indices) for expert, indices in covering.items()]
    groups: dict[tuple[int, ...], list[Expert]] = {}
    for expert, indices in covering.items():
        groups.setdefault(indices, []).append(expert)
    return [(tuple(experts), indices) for indices, experts in groups.items()]


def _shares(
    chosen: Chosen, owners: Sequence[str], priors: np.ndarray, gram: Gram | None, settings: AggregationSettings
) -> tuple[np.ndarray, bool]:
    """Return a per update, and whether a dense rule forms blocks of them; the rule judges devices."""
    devices = list(dict.fromkeys(owners))
    if not chosen.decides(len(devices)) or chosen.rule.weights is weighted_mean:
        return weighted_mean(gram, priors), False
    members = [[row for row, owner in enumerate(owners) if owner == device] for device in devices]
    joint = np.array([math.fsum(priors[rows]) for rows in members])
    parts = np.zeros((len(devices), len(owners)))  # of every update in the mean of its device
    for device, rows in enumerate(members):
        parts[device, rows] = priors[rows] / joint[device]
    if chosen.rule.dense:
        return parts.sum(axis=0) / len(devices), True
    if gram is not None:
        gram = _clip_root(
            _with_root(gram if len(devices) == len(owners) else gram.merged(parts), settings, devices), settings
        )
    return chosen.weigh(gram, joint) @ parts, False


def _with_root(gram: Gram, settings: AggregationSettings, devices: Sequence[str]) -> Gram:
    if settings.root in (None, TIER1_ROOT) or settings.root not in devices:
        return gram
    return own_root(gram, devices.index(settings.root))


class _Ledger:
    """Collects weights unit by unit, and the sums that cosines, distances and the step's norm are made of."""

    def __init__(self, n: int, expert_bound: float | None):
        self.expert_bound = expert_bound
        self.weights: list[dict[Expert, float]] = [{} for _ in range(n)]
        self.by_block: set[Expert] = set()
        self.inner, self.own2, self.aggregate2, self.distance2 = (np.zeros(n) for _ in range(4))
        self.step2 = 0.0
        self.measured = np.zeros(n, dtype=bool)

    def enter(
        self,
        covering: Sequence[int],
        owners: Sequence[str],
        clips: Sequence[float],
        priors: np.ndarray,
        masses: Mapping[Expert, float],
        gram: Gram | None,
        chosen: Chosen,
        settings: AggregationSettings,
    ) -> None:
        k = np.asarray(clips, dtype=np.float64)
        if gram is not None and self.expert_bound is not None:
            extra = np.array(clip_factors(owners, gram.norms.tolist(), self.expert_bound))
            k, gram = k * extra, gram.scaled(extra)
        shares, by_block = _shares(chosen, owners, priors, gram, settings)
        if by_block:
            self.by_block |= set(masses)
        for row, i in enumerate(covering):
            for expert, step in masses.items():
                self.weights[i][expert] = float(k[row] * shares[row] * step)
        if gram is not None:
            self._measure(list(covering), gram, shares, max(masses.values()))

    def _measure(self, covering: list[int], gram: Gram, shares: np.ndarray, step: float) -> None:
        to_aggregate = gram.inner @ shares
        own2, aggregate2 = np.diag(gram.inner), max(float(shares @ to_aggregate), 0.0)
        sums_to_one = math.isclose(shares.sum(), 1.0, rel_tol=1e-9)
        distance2 = distance2_to(gram, shares) if sums_to_one else own2 - 2 * to_aggregate + aggregate2
        self.inner[covering] += to_aggregate
        self.own2[covering] += own2
        self.aggregate2[covering] += aggregate2
        self.distance2[covering] += np.maximum(distance2, 0.0)
        self.step2 += step**2 * aggregate2  # experts judged together: their largest mass, so never too little
        self.measured[covering] = True

    def close(self, settings: AggregationSettings) -> Weighing:
        if settings.max_step_norm is not None:
            shrink = clip_factor(math.sqrt(self.step2), settings.max_step_norm)
            self.weights = [{e: shrink * weight for e, weight in row.items()} for row in self.weights]
        lengths = np.sqrt(np.maximum(self.own2 * self.aggregate2, 0.0))
        cosines = np.clip(np.divide(self.inner, lengths, out=np.zeros(len(lengths)), where=lengths > 0), -1.0, 1.0)
        return Weighing(
            weights=self.weights,
            by_block=frozenset(self.by_block),
            cosines=[float(c) if m else None for c, m in zip(cosines, self.measured, strict=True)],
            distances=[float(d) if m else None for d, m in zip(np.sqrt(self.distance2), self.measured, strict=True)],
        )


def _clip_root(gram: Gram, settings: AggregationSettings) -> Gram:
    """Bound the root's norm as an update's, so that a rule that rescales to it cannot exceed the clip."""
    if gram.root is None:
        return gram
    bound = min(settings.max_norm, settings.max_expert_norm or math.inf)
    k = clip_factor(math.sqrt(max(gram.root.norm2, 0.0)), bound)
    root = type(gram.root)(inner=k * gram.root.inner, norm2=k * k * gram.root.norm2)
    return Gram(inner=gram.inner, distance2=gram.distance2, root=root)

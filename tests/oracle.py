"""DESIGN §4 again, with dense matrices, and nothing of tier1: what the aggregation is judged by.

Everything is formed: ΔW_{d,e} = s·B·A as one long vector per update and expert, robust rules as their papers write
them, distances from differences. In long double (80 bit on x86) where rules compare updates, in fp64 elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Place = tuple[int, int]  # (layer, expert)
Real = np.longdouble


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One record of the log: who says what, trained on which version.

    Args:
        order: canonical name of the update, by which ties are broken.
        scale: α/r.
        factors: slice key → (A, B).
        tokens: (layer, expert) → declared tokens.
    """

    client: str
    sequence: int
    base: int
    order: str
    scale: float
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    tokens: Mapping[Place, int]

    def matrix(self, key: str) -> np.ndarray:
        """Return s·B·A."""
        a, b = self.factors[key]
        return self.scale * b.astype(np.float64) @ a.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The settings that the oracle knows; `options` are those of the rule."""

    eta: float = 1.0
    max_norm: float = 50.0
    token_cap: int = 1 << 20
    staleness: str = "polynomial"
    exponent: float = 0.5
    hinge_delay: int = 4
    hinge_slope: float = 1.0
    max_staleness: int = 16
    min_mass_tokens: int = 256
    min_coverage: int = 1
    mass_ratio: float | None = None
    rule: str = "weighted_mean"
    options: Mapping[str, Any] = field(default_factory=dict)
    root: str | None = None

    def discount(self, tau: int) -> float:
        """FedBuff's and FedAsync's staleness functions."""
        if self.staleness == "hinge":
            return 1.0 if tau <= self.hinge_delay else 1 / (1 + self.hinge_slope * (tau - self.hinge_delay))
        return 1.0 if self.staleness == "constant" else 1 / (1 + tau) ** self.exponent


def place_of(key: str) -> Place:
    """Return (layer, expert) of a slice key model.layers.<n>.mlp.experts.<projection>/<expert>."""
    return int(key.split(".")[2]), int(key.rsplit("/", 1)[1])


def run(
    genesis: Mapping[str, np.ndarray], cuts: Sequence[Sequence[Sent]], pipeline: Pipeline
) -> tuple[list[dict[str, np.ndarray]], list[list[str]]]:
    """Return the weights of every version and the names of the updates each folded; version 0 folded none."""
    versions, folded = [{key: matrix.astype(np.float64) for key, matrix in genesis.items()}], [[]]
    seen: set[tuple[str, int]] = set()
    for cut in cuts:
        head, new, spent = len(versions) - 1, [], set()
        for sent in cut:
            claim = (sent.client, sent.sequence)
            if claim in seen or claim in spent:
                continue
            spent.add(claim)
            if head - sent.base <= pipeline.max_staleness:
                new.append(sent)
        if not new:
            continue
        seen |= {(sent.client, sent.sequence) for sent in new}
        new.sort(key=lambda sent: sent.order)
        versions.append(step(versions[-1], new, [head - sent.base for sent in new], pipeline))
        folded.append([sent.order for sent in new])
    return versions, folded


def step(
    weights: Mapping[str, np.ndarray], updates: Sequence[Sent], taus: Sequence[int], pipeline: Pipeline
) -> dict[str, np.ndarray]:
    """Return the weights after one fold."""
    norms2: dict[str, float] = {}
    for update in updates:
        square = sum((update.matrix(k) ** 2).sum() for k in update.factors if update.tokens[place_of(k)] > 0)
        norms2[update.client] = norms2.get(update.client, 0.0) + square
    clips = [min(1.0, pipeline.max_norm / math.sqrt(max(norms2[update.client], 1e-300))) for update in updates]
    senders = sorted({update.client for update in updates if sum(update.tokens.values()) > 0})
    per_expert = []
    for sender in senders:
        mine = [update for update in updates if update.client == sender]
        covered = {place for update in mine for place, count in update.tokens.items() if count > 0}
        per_expert.append(sum(sum(update.tokens.values()) for update in mine) / len(covered))
    usual = sorted(per_expert)[(len(senders) - 1) // 2] if senders else 0.0
    keys_of: dict[Place, list[str]] = {}
    for key in sorted(weights):
        keys_of.setdefault(place_of(key), []).append(key)
    result = dict(weights)
    for place, keys in keys_of.items():
        members = [i for i, update in enumerate(updates) if update.tokens.get(place, 0) > 0]
        if not members:
            continue
        said = np.array([updates[i].tokens[place] for i in members], dtype=np.float64)
        owners = np.array([updates[i].client for i in members])
        devices = list(dict.fromkeys(owners.tolist()))
        capped = said.copy()
        for device in devices:
            capped[owners == device] *= min(1, pipeline.token_cap / said[owners == device].sum())
        p = capped * [pipeline.discount(taus[i]) for i in members]
        mass = min(1, len(devices) / pipeline.min_coverage) * p.sum() / max(capped.sum(), pipeline.min_mass_tokens)
        if pipeline.mass_ratio is not None:
            seen = sum(min(usual, said[owners == device].sum()) for device in devices)
            mass *= min(1, seen / (pipeline.mass_ratio * len(senders) * usual))
        vectors = np.stack(
            [np.concatenate([clips[i] * updates[i].matrix(key).ravel() for key in keys]) for i in members]
        )
        whole = np.stack([p[owners == c] @ vectors[owners == c] / p[owners == c].sum() for c in devices])
        joint = np.array([p[owners == c].sum() for c in devices])
        root = devices.index(pipeline.root) if pipeline.root in devices else None
        aggregate = mass * robust(pipeline.rule, whole, joint, root=root, **pipeline.options)
        ends = np.cumsum([weights[key].size for key in keys])
        for key, part in zip(keys, np.split(aggregate, ends[:-1]), strict=True):
            result[key] = weights[key] + pipeline.eta * part.reshape(weights[key].shape)
    return result


def robust(rule: str, x: np.ndarray, p: np.ndarray, *, root: int | None = None, **options: Any) -> np.ndarray:
    """Return the aggregate of dense vectors x [n, size], with the documented fall-back below the rule's minimum."""
    if rule == "fltrust" and root is not None:
        return fltrust(x, p, x[root])
    function, least = RULES[rule]
    if function is None or len(x) < least(options):
        return (p / p.sum()) @ x
    return np.asarray(function(x.astype(Real), p.astype(Real), **options), dtype=np.float64)


def distances(x: np.ndarray) -> np.ndarray:
    """Return ‖x_i − x_j‖ from differences."""
    return np.sqrt(((x[:, None] - x[None, :]) ** 2).sum(axis=2))


def multi_krum(x: np.ndarray, p: np.ndarray, f: int = 1, m: int | None = None) -> np.ndarray:
    n, d2 = len(x), distances(x) ** 2
    scores = [sorted(d2[i][j] for j in range(n) if j != i)[: max(n - f - 2, 1)] for i in range(n)]
    best = sorted(range(n), key=lambda i: (sum(scores[i]), i))[: min(m or n - f, n)]
    return (p[best] / p[best].sum()) @ x[best]


def geometric_median(x: np.ndarray, p: np.ndarray, iterations: int = 64) -> np.ndarray:
    q = p / p.sum()
    z, floor = q @ x, 1e-9 * np.sqrt(q @ distances(x) ** 2 @ q)
    for _ in range(iterations):
        inverse = p / np.maximum(np.sqrt(((x - z) ** 2).sum(axis=1)), floor)
        z = inverse @ x / inverse.sum()
    return z


def centred_clipping(x: np.ndarray, p: np.ndarray, radius: float | None = None, iterations: int = 8) -> np.ndarray:
    q = p / p.sum()
    v = x[int(np.argmin(distances(x) @ q))]
    if radius is None:
        apart = np.sqrt(((x - v) ** 2).sum(axis=1))
        order = np.argsort(apart, kind="stable")
        radius = apart[order][np.searchsorted(np.cumsum(q[order]), Real(0.5) * q.sum())]
    for _ in range(iterations):
        apart = np.sqrt(((x - v) ** 2).sum(axis=1))
        v = v + sum(q[i] * min(Real(1), radius / apart[i]) * (x[i] - v) for i in range(len(x)) if apart[i] > 0)
    return v


def foolsgold(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    n, norms = len(x), np.sqrt((x**2).sum(axis=1))
    unit = np.where(norms[:, None] > 0, x / np.where(norms > 0, norms, 1)[:, None], 0)
    apart = ((unit[:, None] - unit[None, :]) ** 2).sum(axis=2) / 2  # 1 − cos of unit vectors, without cancellation
    apart[(norms == 0), :] = apart[:, (norms == 0)] = 1
    np.fill_diagonal(apart, np.inf)
    u = apart.min(axis=1)
    likeness = np.empty((n, n), dtype=Real)  # kept as 1 − likeness
    for i in range(n):
        for j in range(n):
            pardon = min((u[i] - u[j]) / (1 - u[j]), Real(1)) if u[i] > u[j] else Real(0)
            c = apart[i, j]
            likeness[i, j] = c + pardon - c * pardon if c < 1 else c
    share = np.clip(likeness.min(axis=1), 0, 1)
    if share.max() <= 0:
        return (p / p.sum()) @ x
    share = np.clip(share / share.max(), 0, Real(0.99))
    with np.errstate(divide="ignore"):
        share = np.clip(np.log(share / (1 - share)) + Real(0.5), 0, 1)
    return (share * p) @ x / (share * p).sum()


def fltrust(x: np.ndarray, p: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Return Σ TS_i·‖g_0‖·x_i/‖x_i‖ / Σ TS_i with TS = ReLU(cos)·p."""
    norms, length = np.sqrt((x**2).sum(axis=1)), math.sqrt((root**2).sum())
    safe = np.where(norms > 0, norms, 1)
    trust = p * np.clip(x @ root / (safe * (length or 1)), 0, 1)
    if trust.sum() <= 0:
        return np.zeros(x.shape[1])
    return trust @ (x / safe[:, None]) * length / trust.sum()


def coordinate_median(x: np.ndarray, _p: np.ndarray) -> np.ndarray:
    return np.median(x.astype(np.float64), axis=0)


def trimmed_mean(x: np.ndarray, _p: np.ndarray, f: int = 1) -> np.ndarray:
    return np.sort(x, axis=0)[f : len(x) - f].mean(axis=0)


RULES: dict[str, tuple[Callable[..., np.ndarray] | None, Callable[[Mapping[str, Any]], int]]] = {
    "weighted_mean": (None, lambda _o: 1),
    "krum": (lambda x, p, f=1: multi_krum(x, p, f=f, m=1), lambda o: 2 * o.get("f", 1) + 3),
    "multi_krum": (multi_krum, lambda o: 2 * o.get("f", 1) + 3),
    "geometric_median": (geometric_median, lambda _o: 3),
    "centred_clipping": (centred_clipping, lambda _o: 3),
    "foolsgold": (foolsgold, lambda _o: 3),
    "fltrust": (None, lambda _o: 1),
    "coordinate_median": (coordinate_median, lambda _o: 3),
    "trimmed_mean": (trimmed_mean, lambda o: 2 * o.get("f", 1) + 1),
}

"""flwr's Krum beside ours on the same dense updates, 4 layers × 8 experts, 7 clients of which 2 are hostile.

Both get the same updates: ours as factors, flwr as the products s·B·A, fp32, one tensor per expert matrix, which its
Krum needs to judge updates and not factors. The referee forms differences in fp64 and never cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np

from benchmarks.aggregation.workload import ALPHA, Shape
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors
from tier1.aggregation.fold import one_thread
from tier1.aggregation.gram import matrix_gram
from tier1.aggregation.registry import choose
from tier1.versions.settings import AggregationSettings

SHAPE = Shape(layers=4, experts=8, last=8, hidden=128, width=96, rank=8)
CLIENTS, HOSTILE = 7, 2


def buffer(seed: int, spread: float) -> list[Delta]:
    """Draw updates that differ by `spread` of their size; the last two are sign-flipped."""
    rng = np.random.default_rng(seed)
    common = _draw(rng)
    return [
        Delta(
            spec=AdapterSpec(rank=SHAPE.rank, alpha=ALPHA),
            factors={name: _near(pair, _draw(rng)[name], spread, client) for name, pair in common.items()},
        )
        for client in range(CLIENTS)
    ]


def ours(deltas: Sequence[Delta]) -> int:
    """Return the client that our Krum keeps: Gram matrices of factors, added over all expert matrices."""
    with one_thread():
        grams = [
            matrix_gram([(d.spec.scale, d.factors[name].lora_a[row], d.factors[name].lora_b[row]) for d in deltas])
            for name in SHAPE.params
            for row in range(SHAPE.experts)
        ]
    chosen = choose(AggregationSettings(rule="krum", rule_options={"f": HOSTILE}))
    return int(np.argmax(chosen.weigh(reduce(add, grams), np.ones(len(deltas)))))


def referee(deltas: Sequence[Delta]) -> int:
    """Return the client that Krum keeps by its definition (Blanchard et al. 2017), differences in fp64."""
    vectors = [np.concatenate([dense.ravel() for dense in _products(d, np.float64).values()]) for d in deltas]
    apart = np.array([[((x - y) ** 2).sum() for y in vectors] for x in vectors])
    nearest = np.sort(apart, axis=1)[:, 1 : CLIENTS - HOSTILE - 1]
    return int(np.argmin(nearest.sum(axis=1)))


def write(deltas: Sequence[Delta], directory: Path) -> list[Path]:
    """Write the products for flwr."""
    paths = [directory / f"dense-{client}.npz" for client in range(len(deltas))]
    for delta, path in zip(deltas, paths, strict=True):
        np.savez(path, **{f"{name}|dense": dense for name, dense in _products(delta, np.float32).items()})
    return paths


def kept(result: dict[str, np.ndarray], deltas: Sequence[Delta]) -> int:
    """Return the client whose update flwr's Krum returned."""
    name = next(iter(SHAPE.params))
    found = result[f"{name}|dense|0"]
    return int(np.argmin([np.abs(_products(d, np.float32)[name][0] - found).max() for d in deltas]))


def _draw(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        name: (
            rng.standard_normal((n, SHAPE.rank, d_in), dtype=np.float32),
            rng.standard_normal((n, d_out, SHAPE.rank), dtype=np.float32),
        )
        for name, (n, d_out, d_in) in SHAPE.params.items()
    }


def _near(common: tuple, own: tuple, spread: float, client: int) -> ExpertFactors:
    sign = -1 if client >= CLIENTS - HOSTILE else 1
    lora_a, lora_b = (shared + np.float32(spread) * noise for shared, noise in zip(common, own, strict=True))
    return ExpertFactors(expert_ids=SHAPE.adapted(0), lora_a=lora_a, lora_b=np.float32(sign) * lora_b)


def _products(delta: Delta, dtype: type) -> dict[str, np.ndarray]:
    return {
        name: delta.spec.scale * (factors.lora_b.astype(dtype) @ factors.lora_a.astype(dtype))
        for name, factors in delta.factors.items()
    }

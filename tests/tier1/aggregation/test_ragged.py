from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, decode, encode
from fednested_lib.partition import expert_name
from fednested_lib.snapshot import SLICE_TENSOR, encode_blob, slice_key
from tests.tier1.aggregation.schedules import MemoryBlobs
from tier1.aggregation.fold import WeightedUpdate, fold_experts
from tier1.aggregation.outer import fold_stepped
from tier1.aggregation.weights import weigh
from tier1.versions.settings import AggregationSettings, OuterSettings

pytestmark = pytest.mark.usefixtures("many_folds")
N_BUFFERS = 10_000
LAYERS, EXPERTS = 2, 3
SHAPES = {expert_name(layer, "down_proj"): (EXPERTS, 4, 3) for layer in range(LAYERS)}


def random_update(rng: np.random.Generator) -> tuple[Delta, dict[int, tuple[int, ...]], dict[tuple[int, int], int]]:
    """Draw any rank, any subset of layers and experts, any tokens; at least one expert."""
    ids = {layer: tuple(np.flatnonzero(rng.random(EXPERTS) < 0.5).tolist()) for layer in range(LAYERS)}
    if not any(ids.values()):
        ids[int(rng.integers(LAYERS))] = (int(rng.integers(EXPERTS)),)
    rank = int(rng.integers(1, 9))
    factors = {
        name: ExpertFactors(
            expert_ids=ids[layer],
            lora_a=rng.standard_normal((len(ids[layer]), rank, d_in), dtype=np.float32),
            lora_b=rng.standard_normal((len(ids[layer]), d_out, rank), dtype=np.float32),
        )
        for layer, (name, (_, d_out, d_in)) in enumerate(SHAPES.items())
        if ids[layer]
    }
    tokens = {(layer, e): int(rng.choice([0, 8, 512])) for layer in ids for e in ids[layer]}
    return Delta(spec=AdapterSpec(rank=rank, alpha=2.0), factors=factors), {k: v for k, v in ids.items() if v}, tokens


def factors_of(delta: Delta) -> Callable[[str, int], tuple[np.ndarray, np.ndarray]]:
    def read(param: str, expert: int) -> tuple[np.ndarray, np.ndarray]:
        factors = delta.factors[param]
        i = factors.expert_ids.index(expert)
        return factors.lora_a[i], factors.lora_b[i]

    return read


@pytest.mark.parametrize("outer", [None, OuterSettings(kind="nesterov")], ids=["plain", "outer"])
def test_no_ragged_buffer_is_refused_and_untouched_experts_stay(outer):
    """10,000 buffers through the strict parser and the fold: none refused, what nobody covers keeps its digests."""
    rng, settings, store = np.random.default_rng(0), AggregationSettings(min_mass_tokens=8), MemoryBlobs()
    blobs = {
        slice_key(name, e): store.put(encode_blob({SLICE_TENSOR: rng.standard_normal((4, 3), dtype=np.float32)}))
        for name in SHAPES
        for e in range(EXPERTS)
    }
    states: dict[str, str] = {}
    for number in range(N_BUFFERS // 2):
        updates, tokens = [], []
        for _ in range(int(rng.integers(1, 4))):
            delta, ids, counts = random_update(rng)
            payload = encode(delta, encoding="int8", seed=number)
            parsed = decode(payload, encoding="int8", spec=delta.spec, expert_ids=ids, shapes=SHAPES)
            updates.append(parsed)
            tokens.append(counts)
        rows = weigh("abc"[: len(updates)], tokens, [0] * len(updates), [1.0] * len(updates), settings).weights
        weighted = [
            WeightedUpdate(
                update_id=f"{i:064x}", client_id=str(i), scale=d.spec.scale, weights=row, factors=factors_of(d)
            )
            for i, (d, row) in enumerate(zip(updates, rows, strict=True))
        ]
        if outer is None:
            folded, kept = fold_experts(blobs, weighted, eta=1e-3, store=store), states
        else:
            folded, kept = fold_stepped(blobs, weighted, eta=1e-3, store=store, outer=outer, states=states)
        touched = {place for counts in tokens for place, count in counts.items() if count > 0}
        for layer, name in enumerate(SHAPES):
            for e in range(EXPERTS):
                key, moved = slice_key(name, e), (layer, e) in touched
                assert (folded[key] != blobs[key]) == moved
                assert (kept.get(key) != states.get(key)) == (moved and outer is not None)
        blobs, states = folded, kept
        store.forget({*blobs.values(), *states.values()})

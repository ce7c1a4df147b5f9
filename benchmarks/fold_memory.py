"""Fold a buffer of N updates in this process and print what memory it took: `python -m benchmarks.fold_memory N`.

Peak is the high-water mark of the resident set (VmHWM) above its value after imports; `/proc/self/clear_refs` sets the
mark back before the fold. The fold is the product's: read an archived update, spool it, Gram, rule, fold, store.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import structlog

from fednested_lib.blobs import BlobStore
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, decode, encode
from fednested_lib.partition import expert_name, expert_param
from fednested_lib.snapshot import SLICE_TENSOR, encode_blob, slice_key
from tier1.aggregation.fold import WeightedUpdate, fold_experts, magnitude
from tier1.aggregation.spool import FactorSpool
from tier1.aggregation.streaming import spooled_grams
from tier1.aggregation.weights import clip_factor, weigh
from tier1.versions.settings import AggregationSettings

LAYERS, EXPERTS, D_MODEL, D_FF, RANK = 4, 8, 1024, 1024, 8
SHAPES = {
    expert_name(layer, projection): (EXPERTS, *shape)
    for layer in range(LAYERS)
    for projection, shape in (("gate_up_proj", (2 * D_FF, D_MODEL)), ("down_proj", (D_MODEL, D_FF)))
}


def make_payloads(store: BlobStore, n: int) -> list[str]:
    """Archive n updates of every expert."""
    ids, digests = tuple(range(EXPERTS)), []
    for i in range(n):
        rng = np.random.default_rng(i)
        factors = {
            name: ExpertFactors(
                expert_ids=ids,
                lora_a=rng.standard_normal((EXPERTS, RANK, d_in), dtype=np.float32),
                lora_b=rng.standard_normal((EXPERTS, d_out, RANK), dtype=np.float32) / 64,
            )
            for name, (_, d_out, d_in) in SHAPES.items()
        }
        delta = Delta(spec=AdapterSpec(rank=RANK, alpha=16.0), factors=factors)
        digests.append(store.put(encode(delta, encoding="int8", seed=i)))
    return digests


def fold(blobs: dict[str, str], digests: list[str], store: BlobStore, scratch: Path) -> None:
    """Clip, weigh and fold archived updates."""
    spec, ids = AdapterSpec(rank=RANK, alpha=16.0), dict.fromkeys(range(LAYERS), tuple(range(EXPERTS)))
    tokens = {(layer, expert): 512 for layer in range(LAYERS) for expert in range(EXPERTS)}
    settings = AggregationSettings(rule="geometric_median")
    with FactorSpool(str(scratch)) as spool:
        norms = []
        for digest in digests:
            delta = decode(store.get(digest), encoding="int8", spec=spec, expert_ids=ids, shapes=SHAPES)
            norms.append(magnitude(delta, tokens)[0])
            spool.add(digest, delta)
            del delta

        def update(digest: str, weights: dict) -> WeightedUpdate:
            return WeightedUpdate(
                update_id=digest,
                client_id=digest,
                scale=spec.scale,
                weights=weights,
                factors=lambda p, e: spool.read(digest, p, e),
            )

        clips = [clip_factor(norm, settings.max_norm) for norm in norms]
        grams = spooled_grams([update(digest, {}) for digest in digests], clips, list(SHAPES))
        rows = weigh(digests, [tokens] * len(digests), [0] * len(digests), clips, settings, grams=grams).weights
        fold_experts(blobs, [update(d, row) for d, row in zip(digests, rows, strict=True)], eta=1.0, store=store)


def status_bytes(field: str) -> int:
    """Read a field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(n_clients: int) -> None:
    """Measure and print."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory() as directory:
        store = BlobStore(Path(directory) / "store")
        after_imports = status_bytes("VmRSS")
        digests = sorted(make_payloads(store, n_clients))
        weight = np.zeros((2 * D_FF, D_MODEL), np.float32)
        blobs = {
            slice_key(name, expert): store.put(encode_blob({SLICE_TENSOR: weight[:d_out, :d_in] + expert}))
            for name, (_, d_out, d_in) in SHAPES.items()
            for expert in range(EXPERTS)
        }
        Path("/proc/self/clear_refs").write_text("5")
        fold(blobs, digests, store, Path(directory))
        process = status_bytes("VmHWM")
    layer = [shape for name, shape in SHAPES.items() if expert_param(name)[0] == 0]
    print(
        json.dumps(
            {
                "process": process,
                "peak": process - after_imports,
                "shard": 4 * sum(n * d_out * d_in for n, d_out, d_in in layer),
                "adapters": 4 * n_clients * sum(n * RANK * (d_out + d_in) for n, d_out, d_in in layer),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""Fold one buffer in many orders of arrival and print a digest per order: `python -m … N_ORDERS THREADS SEED`.

The digest covers weights, optimiser state and weights in the manifest, under a robust rule and an outer optimiser.
"""

from __future__ import annotations

import logging
import sys

import numpy as np
import structlog
import torch

from fednested_lib.signing import canonical_json, sha256_hex
from tests.tier1.aggregation.schedules import Planned, Run, Schedule, random_delta, random_schedule
from tier1.versions.settings import AggregationSettings, OuterSettings


def digests(n_orders: int, threads: int, seed: int) -> list[str]:
    """Return one digest per order of arrival."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(7)
    clients = ("ann", "bob", "cyd", "dee", "eve", "fay", "gus")
    sends = [
        Planned(client=c, sequence=0, base=0, delta=random_delta(rng, range(3)), experts=(0, 1, 2), tokens=(128,) * 3)
        for c in clients
    ]
    settings = AggregationSettings(
        rule="geometric_median", outer=OuterSettings(kind="nesterov"), reputation={}, max_norm=5.0
    )
    orders, found = np.random.default_rng(seed), []
    for _ in range(n_orders):
        cut = [sends[i] for i in orders.permutation(len(sends))]
        run = Run(Schedule(genesis=random_schedule(0).genesis, cuts=[cut], settings=settings, eta=1.0))
        run.go()
        candidate = run.sealed[-1].entry.body.candidate
        rows = [[row.update_id, row.weight, row.norm, row.cosine, row.distance] for row in candidate.accepted]
        found.append(sha256_hex(canonical_json([candidate.blobs, candidate.outer, rows])))
    return found


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    print("\n".join(digests(*map(int, sys.argv[1:]))))

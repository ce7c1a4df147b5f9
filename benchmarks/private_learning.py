"""What differential privacy leaves of learning, on real text: devices that speak in plays, mode `fixed_a`.

    mean over N devices of clip(u_d) + N(0, (z·C)²)   =   mean of clip(u_d) + N(0, (z·C)²/N)

so N devices are measured with the few that there are, their text standing for that of all, and the noise of N: exact
for the noise, and for the signal as far as more devices would not agree better. The fold adds the mean once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.world import Run, World
from fednested_lib.adapters import attach, merge
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors
from fednested_lib.fixed_a import seed_of
from fednested_lib.privacy import SECRET_BYTES, gaussian
from fednested_lib.sidecar import clip
from fednested_lib.snapshot import build_model
from fednested_lib.text import load_tokenizer, pack, read_texts
from fednested_lib.training import mean_loss, train_adapters

ROWS_PER_DEVICE = 32  # of held-out text, that a loss is taken on


class PrivateRound:
    """One round of a world's devices, trained in mode `fixed_a` on its first version.

    Args:
        directory: empty.
        clip_norm: C.
    """

    def __init__(self, directory: Path, clip_norm: float):
        self.world, self.clip_norm = World(directory, seed=0), clip_norm
        self.fed, self.base = (run := Run(self.world, "private")).fed, run.champion
        deltas = [self._train(client) for client in self.world.clients]
        self.mean = average(deltas)
        self.clipped = average([clip(delta, clip_norm) for delta in deltas])
        self.loss_before = self.loss(None)

    def _train(self, client: str) -> Delta:
        sizes, snapshot = self.world.sizes, self.base.snapshot
        spec = AdapterSpec(
            rank=sizes.rank, alpha=2.0 * sizes.rank, mode="fixed_a", seed=seed_of(self.base.base_digest)
        )  # fmt: skip
        model = build_model(snapshot, self.fed.blobs, experts="fednested_lora")
        adapters = attach(model, spec, None, seed=0)
        how = {"steps": sizes.local_steps, "batch_size": sizes.batch, "learning_rate": sizes.local_rate, "seed": 0}
        train_adapters(model, adapters, self.world.rows_of(self.fed, snapshot, client), **how)
        return copy.deepcopy(adapters.to_delta())

    def loss(self, delta: Delta | None) -> float:
        """Return nats per token of held-out text of all devices, of the version plus a delta."""
        tokenizer = load_tokenizer(self.fed.blobs.get(self.base.snapshot.tokenizer))
        model = build_model(self.base.snapshot, self.fed.blobs)
        if delta is not None:
            merge(model, delta)
        rows = [self._heldout(path, tokenizer) for path in self.world.judges.values()]
        return mean_loss(model, np.concatenate(rows))[0]

    def _heldout(self, path: Path, tokenizer) -> np.ndarray:
        rows = pack(read_texts(path)[0], tokenizer, self.world.sizes.seq_len, source=path, key="sizes.seq_len")
        return rows[:ROWS_PER_DEVICE]

    def gain_kept(self, *, noise_multiplier: float, n_devices: int) -> float:
        """Return the gain of the fold of n noised updates as a share of that of updates neither clipped nor noised."""
        noised = gaussian(
            self.clipped,
            clip_norm=self.clip_norm,
            noise_multiplier=noise_multiplier / math.sqrt(n_devices),
            secret=bytes(SECRET_BYTES),
            label=f"mean of {n_devices}",
        )
        return (self.loss_before - self.loss(noised)) / (self.loss_before - self.loss(self.mean))


def average(deltas: list[Delta]) -> Delta:
    """Average updates of mode `fixed_a` and one seed, which are linear in B."""
    factors: Mapping[str, ExpertFactors] = {
        name: ExpertFactors(
            expert_ids=first.expert_ids,
            lora_a=first.lora_a,
            lora_b=np.mean([delta.factors[name].lora_b for delta in deltas], axis=0),
        )
        for name, first in deltas[0].factors.items()
    }
    return Delta(spec=deltas[0].spec, factors=factors)

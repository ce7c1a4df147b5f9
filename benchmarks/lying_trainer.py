"""What a trainer that lies can still say through the sidecar: bits that survive the rounding, and a bound on all.

    int8    values · log₂ 255 + scales · log₂(254 · 2²³) + counts · log₂ 42 + telemetry + choice of adapter and base
    DP      ½ · n · log₂(1 + C²/(n·σ²))  <  1/(2·z²·ln 2)     (Gaussian channel of power C² over n values; Shannon 1948)

The first is a count of what an update can be, not an estimate of what arrives: every code is the trainer's to choose.
Neither counts when a device sends, or whether it does.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.sidecar_scene import DEVICE, RULES, make_base, make_delta
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, decode
from fednested_lib.orders import KEPT
from fednested_lib.sidecar import MAX_LOSS, make_update
from fednested_lib.snapshot import expert_shapes
from fednested_lib.spool import Spool
from tests.policies import make_policy

WIDE = {"num_local_experts": 8, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8}
COUNTS = math.log2(42)  # 0, 1, 2, 4 … 2⁴⁰


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Bits of one update by what carries them, and its number of values."""

    values: int
    codes: float
    scales: float
    counts: float
    telemetry: float
    choices: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.codes + self.scales + self.counts + self.telemetry + self.choices


def capacity_bits(
    *, experts: int = 8, rank: int = 8, d_in: int = 512, d_out: int = 512, noise_multiplier: float | None = None
) -> Capacity:
    """Bound one update of one fused parameter, with the adapters of `RULES` and telemetry on.

    Args:
        experts: adapted.
        rank: r.
        d_in: columns.
        d_out: rows.
        noise_multiplier: z of differential privacy; None: off, int8.
    """
    choices = math.log2(len(RULES["adapters"])) + math.log2(KEPT)
    values = experts * rank * (d_in + d_out)
    if noise_multiplier is not None:
        noised = 1 / (2 * noise_multiplier**2 * math.log(2))
        return Capacity(
            values=experts * rank * d_out, codes=noised, scales=0.0, counts=0.0, telemetry=noised, choices=choices
        )
    losses, seconds = 2 * math.log2(1000 * MAX_LOSS + 1), math.log2(90 * 10)
    return Capacity(
        values=values,
        codes=values * math.log2(255),
        scales=2 * experts * rank * math.log2(254 * 2**23),
        counts=(experts + 1) * COUNTS,
        telemetry=losses + seconds + COUNTS,
        choices=choices,
    )


def lsb_agreement(n_bits: int, seed: int = 9) -> float:
    """Hide random bits in the lowest mantissa bits of an update, send it as int8, and read them back.

    Args:
        n_bits: how many, at least.
        seed: of values and bits.

    Returns:
        The share that is read right by the better of two readers: the lowest mantissa bit of what arrives, and the
        lowest bit of the codes.
    """
    rng = np.random.default_rng(seed)
    base = make_base(WIDE)
    layers = {layer: tuple(range(WIDE["num_local_experts"])) for layer in range(WIDE["num_hidden_layers"])}
    spooled, bits = {}, {}
    for name, each in make_delta(base, layers=layers, rank=16, size=0.02, seed=seed).factors.items():
        hidden = {factor: _hide(getattr(each, factor), rng) for factor in ("lora_a", "lora_b")}
        bits |= {(name, factor): hidden[factor][1] for factor in hidden}
        spooled[name] = ExpertFactors(
            expert_ids=each.expert_ids, lora_a=hidden["lora_a"][0], lora_b=hidden["lora_b"][0]
        )
    delta = Delta(spec=AdapterSpec(rank=16, alpha=32.0), factors=spooled)
    arrived = _through(base, delta, layers)
    read, coded, total = 0, 0, 0
    for (name, factor), truth in bits.items():
        values = getattr(arrived.factors[name], factor)
        scale = np.abs(values).max(axis=2 if factor == "lora_a" else 1, keepdims=True) / 127
        codes = np.rint(values / scale).astype(np.int64)
        read += int(((values.view(np.uint32) & 1) == truth).sum())
        coded += int(((codes & 1) == truth).sum())
        total += truth.size
    if total < n_bits:
        raise RuntimeError(f"only {total} bits were hidden, {n_bits} are wanted")
    return max(read / total, coded / total, key=lambda share: abs(share - 0.5))


def _hide(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    bits = rng.integers(0, 2, values.shape, dtype=np.uint32)
    return ((values.view(np.uint32) & ~np.uint32(1)) | bits).view(np.float32), bits


def _through(base, delta: Delta, layers: dict[int, tuple[int, ...]]) -> Delta:
    counts = {layer: [500] * len(ids) for layer, ids in layers.items()}
    with tempfile.TemporaryDirectory() as place:
        spool = Spool(Path(place))
        spool.write(
            delta,
            sequence=0,
            base_version=base.version,
            base_digest=base.digest,
            routed_tokens=counts,
            distinct_tokens=counts,
            num_examples=8,
        )
        declaration, read = spool.read(0, expert_shapes(base))
    who = {"federation": "fednested", "client_id": "romeo", "key_epoch": 0, "signer": DEVICE}
    policy = make_policy(**{**RULES, "experts": "all", "max_norm": 1e9})
    made = make_update(declaration, read, policy=policy, encoding="int8", **who)
    spec, ids = made.envelope.adapter.spec(), made.envelope.layers()
    return decode(made.payload, encoding="int8", spec=spec, expert_ids=ids, shapes=expert_shapes(base))

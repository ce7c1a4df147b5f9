"""A sidecar with everything it owns, over a base of a few thousand parameters: where spool files are tried on it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from benchmarks.hostile_spool import Draft, draft
from fednested_lib.audit import AuditLog
from fednested_lib.config import OutgoingConfig
from fednested_lib.delta import AdapterSpec, Delta, Encoding, ExpertFactors, decode, fixed_factor
from fednested_lib.envelope import Envelope
from fednested_lib.feedback import Residuals
from fednested_lib.fixed_a import seed_of
from fednested_lib.ledger import Ledger
from fednested_lib.outbox import Outbox
from fednested_lib.policy import Policy
from fednested_lib.sidecar import Sidecar
from fednested_lib.signing import Signer
from fednested_lib.snapshot import SnapshotManifest, expert_shapes
from fednested_lib.spool import Spool
from tests.policies import make_policy

DEVICE = Signer.from_seed(b"a device's key, for benchmarks..")
MODEL = {"num_local_experts": 6, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 3}
LAYERS = {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
SEQUENCE = 7
RULES = {
    "adapters": [
        {"mode": "lora", "rank": 4, "alpha": 8.0},
        {"mode": "fixed_a", "rank": 4, "alpha": 8.0},
        {"mode": "lora", "rank": 2, "alpha": 4.0},
        {"mode": "fixed_a", "rank": 2, "alpha": 4.0},
        {"mode": "lora", "rank": 16, "alpha": 32.0},
    ],
    "experts": {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]},
    "max_norm": 5.0,
    "updates_per_day": 1_000_000,
}


def make_base(model: dict[str, int] = MODEL) -> SnapshotManifest:
    """Return the manifest of a base without blobs: a sidecar reads its shapes alone."""
    return SnapshotManifest(version=3, family="mixtral", model_config=model, tokenizer="0" * 64, blobs={})


def make_delta(
    base: SnapshotManifest, *, layers=LAYERS, mode: str = "lora", rank: int = 4, size: float = 0.1, seed: int = 0
) -> Delta:
    """Return a random delta over some experts."""
    rng = np.random.default_rng(seed)
    spec = AdapterSpec(rank=rank, alpha=2.0 * rank, mode=mode, seed=seed_of(base.digest) if mode == "fixed_a" else None)
    factors = {}
    for name, (_, d_out, d_in) in expert_shapes(base).items():
        ids = tuple(layers.get(int(name.split(".")[2]), ()))
        if not ids:
            continue
        drawn = (size * rng.standard_normal((len(ids), rank, d_in))).astype(np.float32)
        lora_a = fixed_factor(spec, name, ids, d_in) if mode == "fixed_a" else drawn
        lora_b = (size * rng.standard_normal((len(ids), d_out, rank))).astype(np.float32)
        factors[name] = ExpertFactors(expert_ids=ids, lora_a=lora_a, lora_b=lora_b)
    return Delta(spec=spec, factors=factors)


class Scene:
    """One device's sidecar in a directory.

    Args:
        directory: of spool, outbox, ledger and audit log.
        policy: of the site; default: that of `RULES`.
        encoding: of what leaves.
        base: that is held.
    """

    def __init__(
        self,
        directory: Path,
        *,
        policy: Policy | None = None,
        encoding: Encoding = "int8",
        base: SnapshotManifest | None = None,
    ):
        self.base = base or make_base()
        self.spool = Spool(directory / "spool")
        self.spool.directory.mkdir(parents=True, exist_ok=True)
        self.outbox = Outbox(directory / "outbox", max_bytes=1 << 30)
        self.audit = AuditLog(directory / "audit", anchor=directory / "anchor")
        self.sidecar = Sidecar(
            policy=policy or make_policy(**RULES),
            outgoing=OutgoingConfig(encoding=encoding),
            federation="fednested",
            client_id="romeo",
            key_epoch=0,
            signer=DEVICE,
            ledger=Ledger(directory / "ledger.db"),
            audit=self.audit,
            outbox=self.outbox,
            residuals=Residuals(directory / "residuals"),
        )

    def draft(self, delta: Delta, rng: random.Random, secret: str = "") -> Draft:
        """Return the honest draft of a delta, with counts above every floor."""
        ids = {name.split(".")[2]: each.expert_ids for name, each in delta.factors.items()}
        counts = {layer: [rng.randint(64, 400) for _ in experts] for layer, experts in ids.items()}
        return draft(delta, base=self.base, counts=counts, secret=secret)

    def release(self, sequence: int = SEQUENCE, now: float = 1e9) -> Envelope:
        """Release what is spooled under a number."""
        return self.sidecar.release(self.spool, sequence, held=self._held, now=now)[0]

    def clear(self) -> None:
        """Empty the spool."""
        for path in self.spool.directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                for inner in path.iterdir():
                    inner.unlink()
                path.rmdir()
            else:
                path.unlink()

    def sent(self) -> list[tuple[bytes, bytes]]:
        """Return (envelope, payload) of everything in the outbox."""
        return [(item.envelope, self.outbox.payload(item)) for item in self.outbox.pending()]

    def arrived(self, envelope: Envelope, payload: bytes) -> Delta:
        """Parse a payload as tier 1 does."""
        return decode(
            payload,
            encoding=envelope.encoding,
            spec=envelope.adapter.spec(),
            expert_ids=envelope.layers(),
            shapes=expert_shapes(self.base),
        )

    def close(self) -> None:
        """Let go of everything."""
        self.outbox.close()
        self.sidecar.close()

    def _held(self, version: int, digest: str) -> SnapshotManifest | None:
        return self.base if (version, digest) == (self.base.version, self.base.digest) else None

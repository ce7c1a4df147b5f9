"""A tiny federation for tests: real loops, stores, chain and governance over a model of a few thousand parameters."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, encode
from fednested_lib.envelope import HEADER, INLINE_LIMIT_BYTES, make_envelope
from fednested_lib.log import UPDATES
from fednested_lib.partition import expert_param
from fednested_lib.signing import Signer, sha256_hex
from fednested_lib.snapshot import expert_shapes
from tier1.federation import Federation, open_federation
from tier1.versions.settings import AggregationSettings
from tier1.workspace import AGGREGATION, create_workspace

PHRASE = "the king and queen of night did speak to all good lords about love war gold storm ship crown sword field"
WORDS = PHRASE.split()
SMALL_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
# What a new federation begins with, off: a probe would refuse every second random update, bounds hide what is tested.
PLAIN = {name: getattr(AggregationSettings(), name) for name in AGGREGATION}
_logs = itertools.count()


def write_text(path: Path, n_rows: int, seed: int) -> Path:
    """Write a JSONL file of made-up sentences."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (" ".join(rng.choice(WORDS, size=20)) + "." for _ in range(n_rows))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def device_key(client: str) -> Signer:
    """Return the key of a test device, always the same."""
    return Signer.from_seed(bytes.fromhex(sha256_hex(f"test device {client}".encode())))


def make_workspace(
    directory: Path, *, clients=("ann", "bob", "cyd"), bootstrap: str | None = None, **overrides
) -> Path:
    """Write a workspace with data; the log is in memory (one per call) unless `bootstrap` names a broker."""
    write_text(directory / "data/train.jsonl", 200, 1)
    write_text(directory / "data/heldout.jsonl", 40, 2)
    defaults = {
        "log": {"bootstrap": bootstrap or f"memory:{next(_logs)}"},
        "model": {"family": "mixtral", "vocab_size": 300, "config": SMALL_MODEL},
        "core": {"steps": 6, "batch_size": 2, "seq_len": 16, "learning_rate": 1e-3, "threads": 1},
        "window": {"min_updates": 1, "max_wait_s": 0.0},
        "aggregation": PLAIN,
        "evaluation": {"max_tokens": 512, "seq_len": 16, "max_regression": 0.5},
    }
    for section, values in overrides.items():
        defaults[section] = {**defaults.get(section, {}), **values}
    return create_workspace(
        directory,
        datasets={"plays": "data/train.jsonl"},
        suites={"plays": "data/heldout.jsonl"},
        devices={client: device_key(client).public_key for client in clients},
        overrides=defaults,
    )


def make_federation(directory: Path, **options) -> Federation:
    """Open a fresh tiny federation."""
    return open_federation(make_workspace(directory, **options))


@dataclass
class Device:
    """Sends small random updates, signed and encoded as a real device's are."""

    fed: Federation
    client: str
    sequence: int = 0

    def send(
        self,
        *,
        base: int | None = None,
        size: float = 0.01,
        rank: int = 2,
        tokens: int = 256,
        sequence: int | None = None,
        delta: Delta | None = None,
        **changes,
    ):
        """Append one update (random unless given) and return its envelope; `changes` override envelope fields."""
        state = self.fed.chain.state()
        view = state.champion if base is None else state.versions[base]
        if sequence is None:
            sequence, self.sequence = self.sequence, self.sequence + 1
        delta = delta or random_delta(view.snapshot, seed=_seed(self.client, sequence), size=size, rank=rank)
        payload = encode(delta, seed=_seed(self.client, sequence))
        layers = {expert_param(name)[0]: factors.expert_ids for name, factors in delta.factors.items()}
        fields = {
            "federation": state.federation,
            "client_id": self.client,
            "key_epoch": 0,
            "sequence": sequence,
            "base_version": view.version,
            "base_digest": view.base_digest,
            "adapter": {"rank": rank, "alpha": 2.0 * rank, "mode": "lora"},
            "expert_ids": {str(layer): list(ids) for layer, ids in layers.items()},
            "tokens": {str(layer): [tokens] * len(ids) for layer, ids in layers.items()},
            "num_examples": 8,
            "encoding": "int8",
            "payload_sha256": sha256_hex(payload),
            "payload_bytes": len(payload),
            **changes,
        }
        if len(payload) > INLINE_LIMIT_BYTES:
            fields["payload_uri"] = f"blob:{self.fed.payloads.put(payload)}"
        envelope = make_envelope(device_key(self.client), **fields)
        self.append(envelope.to_bytes(), b"" if fields.get("payload_uri") else payload)
        return envelope

    def append(self, envelope: bytes, payload: bytes):
        """Append raw bytes, valid or not."""
        return self.fed.log.append(UPDATES, key=self.client.encode(), value=payload, headers={HEADER: envelope})


def _seed(client: str, sequence: int) -> int:
    return int(sha256_hex(f"{client}/{sequence}".encode())[:12], 16)


def random_delta(snapshot, *, seed: int, size: float, rank: int) -> Delta:
    """Make a delta over all experts with factors of the given size."""
    rng = np.random.default_rng(seed)
    factors = {
        name: ExpertFactors(
            expert_ids=tuple(range(n)),
            lora_a=(size * rng.standard_normal((n, rank, d_in))).astype(np.float32),
            lora_b=(size * rng.standard_normal((n, d_out, rank))).astype(np.float32),
        )
        for name, (n, d_out, d_in) in expert_shapes(snapshot).items()
    }
    return Delta(spec=AdapterSpec(rank=rank, alpha=2.0 * rank), factors=factors)

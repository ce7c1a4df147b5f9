"""A small federation by hand: random weights, signed devices, an in-memory log and a chain in a directory.

Everything is derived from seeds and given times, so two processes that run the same scene write the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from fednested_lib.blobs import BlobStore
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, encode
from fednested_lib.envelope import HEADER, INLINE_LIMIT_BYTES, Envelope, make_envelope
from fednested_lib.errors import ChainConflict
from fednested_lib.log import TOPICS, InMemoryLog
from fednested_lib.signing import Signer, sha256_hex
from fednested_lib.snapshot import SLICE_TENSOR, SnapshotManifest, encode_blob, expert_shapes, slice_key
from tier1.aggregation.fold import numeric_profile
from tier1.config import DeviceRecord
from tier1.versions.admission import Admission, admit, admit_dense
from tier1.versions.build import fold_candidate, refold
from tier1.versions.candidates import save_candidate
from tier1.versions.chain import Chain
from tier1.versions.commit import Settlement, settle
from tier1.versions.cut import read_cut, take_cut
from tier1.versions.dense_update import make_dense
from tier1.versions.manifest import Candidate, Cut, Decision, DenseInput, GateRecord, Genesis, Inputs, SuiteChange
from tier1.versions.settings import AggregationSettings, Rates
from tier1.versions.state import Sealed, VersionView

LOCAL, TIER1 = "updates.experts.local", "updates.tier1"
MODEL = {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
}
SHAPES = expert_shapes(SnapshotManifest(version=0, family="mixtral", model_config=MODEL, tokenizer="0" * 64, blobs={}))
COMMITTER = Signer.from_seed(b"\x01" * 32)
SETTINGS = AggregationSettings(max_norm=5.0, min_mass_tokens=64, max_staleness=3)
ALL_EXPERTS = (0, 1, 2, 3)


def device_key(client: str) -> Signer:
    """Return the key of a device, derived from its name."""
    return Signer.from_seed(bytes.fromhex(sha256_hex(client.encode())))


def random_delta(
    seed: int, *, experts: tuple[int, ...] = ALL_EXPERTS, rank: int = 2, alpha: float = 4.0, size: float = 0.1
) -> Delta:
    """Return a random delta that adapts `experts` of every layer."""
    rng = np.random.default_rng(seed)
    factors = {
        name: ExpertFactors(
            expert_ids=experts,
            lora_a=rng.normal(0, size, (len(experts), rank, d_in)).astype(np.float32),
            lora_b=rng.normal(0, size, (len(experts), d_out, rank)).astype(np.float32),
        )
        for name, (_, d_out, d_in) in SHAPES.items()
    }
    return Delta(spec=AdapterSpec(rank=rank, alpha=alpha), factors=factors)


def shifted(delta: Delta, sign: float, seed: int, noise: float = 0.02) -> Delta:
    """Return ±delta with a little of its own."""
    rng = np.random.default_rng(seed)
    factors = {
        name: ExpertFactors(
            expert_ids=f.expert_ids,
            lora_a=f.lora_a,
            lora_b=(sign * f.lora_b + noise * rng.normal(size=f.lora_b.shape)).astype(np.float32),
        )
        for name, f in delta.factors.items()
    }
    return Delta(spec=delta.spec, factors=factors)


@dataclass
class Scene:
    """One federation in `home`."""

    home: Path
    clients: tuple[str, ...] = ("ada", "bob", "cat", "dan")
    log: InMemoryLog = field(default_factory=lambda: InMemoryLog(name="scene"))
    settings: AggregationSettings = SETTINGS

    def __post_init__(self):
        self.blobs = BlobStore(self.home / "blobs")
        self.payloads = BlobStore(self.home / "payloads")
        self.archive = BlobStore(self.home / "archive")
        self.chain = Chain(self.home / "chain", signer=COMMITTER, trusted={COMMITTER.public_key: "committer"})
        self.devices = {name: DeviceRecord(public_key=device_key(name).public_key) for name in self.clients}
        self.log.create_topics(TOPICS)

    def genesis(self, seed: int = 0) -> Sealed:
        """Write version 0 with random weights, if there is none."""
        if self.chain.exists():
            return self.chain.entries()[0]
        rng = np.random.default_rng(seed)
        blobs = {}
        for shard in ("core/rest", "core/layers.0", "core/layers.1"):
            blobs[shard] = self.blobs.put(encode_blob({f"{shard}.w": rng.normal(size=(6, 5)).astype(np.float32)}))
        for name, (n_experts, d_out, d_in) in SHAPES.items():
            for expert in range(n_experts):
                weight = rng.normal(size=(d_out, d_in)).astype(np.float32)
                blobs[slice_key(name, expert)] = self.blobs.put(encode_blob({SLICE_TENSOR: weight}))
        body = Genesis(
            federation="scene",
            family="mixtral",
            model=MODEL,
            tokenizer=self.blobs.put(b"{}"),
            blobs=blobs,
            profile=numeric_profile(),
            trainer="trainer",
            created_at="2026-01-01T00:00:00+00:00",
        )
        try:
            return self.chain.append(body, 0)
        except ChainConflict:  # another process made the same one
            return self.chain.entries()[0]

    def envelope(
        self,
        client: str,
        sequence: int,
        delta: Delta,
        *,
        base: VersionView | None = None,
        n_tokens: int = 128,
        **fields,
    ) -> tuple[Envelope, bytes]:
        """Return (envelope, payload) of one update."""
        base = base or self.chain.state().head
        payload = fields.pop("payload", None) or encode(delta, encoding="fp32", seed=sequence)
        layers = sorted({int(name.split(".")[2]) for name in delta.factors})
        experts = list(next(iter(delta.factors.values())).expert_ids)
        given = {
            "federation": "scene",
            "client_id": client,
            "key_epoch": 0,
            "sequence": sequence,
            "base_version": base.version,
            "base_digest": base.base_digest,
            "adapter": {"rank": delta.spec.rank, "alpha": delta.spec.alpha, "mode": "lora"},
            "expert_ids": {str(layer): experts for layer in layers},
            "tokens": {str(layer): [n_tokens] * len(experts) for layer in layers},
            "num_examples": 8,
            "encoding": "fp32",
            "payload_sha256": sha256_hex(payload),
            "payload_bytes": len(payload),
            "payload_uri": None if len(payload) <= INLINE_LIMIT_BYTES else f"blob:{sha256_hex(payload)}",
        }
        return make_envelope(fields.pop("signer", device_key(client)), **{**given, **fields}), payload

    def send(self, client: str, sequence: int, delta: Delta | None = None, **fields) -> tuple[int, int]:
        """Append one update to the log, by claim check when it is large."""
        delta = delta or random_delta(seed=sum(client.encode()) * 1000 + sequence)
        envelope, payload = self.envelope(client, sequence, delta, **fields)
        value = payload if envelope.payload_uri is None else self._put(payload)
        return self.send_bytes(client, envelope.to_bytes(), value)

    def _put(self, payload: bytes) -> bytes:
        self.payloads.put(payload)
        return b""

    def send_bytes(self, key: str, envelope: bytes, value: bytes) -> tuple[int, int]:
        """Append any record."""
        return self.log.append(LOCAL, key=key.encode(), value=value, headers={HEADER: envelope})

    def dense(
        self, run_id: str, *, seed: int = 5, base: VersionView | None = None, size: float = 0.1, **fields
    ) -> DenseInput:
        """Publish the dense delta of a training run on two core shards and one expert."""
        base = base or self.chain.state().head
        rng = np.random.default_rng(seed)
        shapes = {"core/rest": "core/rest.w", "core/layers.1": "core/layers.1.w"}
        blobs = {
            key: self.archive.put(encode_blob({name: rng.normal(0, size, (6, 5)).astype(np.float32)}))
            for key, name in shapes.items()
        }
        name, (_, d_out, d_in) = next(iter(SHAPES.items()))
        delta = {SLICE_TENSOR: rng.normal(0, size, (d_out, d_in)).astype(np.float32)}
        blobs[slice_key(name, 1)] = self.archive.put(encode_blob(delta))
        update = make_dense(
            COMMITTER,
            run_id=run_id,
            base_version=base.version,
            base_digest=base.base_digest,
            blobs=blobs,
            steps=3,
            tokens=100,
            dataset_digest="d" * 64,
            trainer="trainer",
            **fields,
        )
        partition, offset = self.log.append(TIER1, key=run_id.encode(), value=update.to_bytes(), headers={})
        record = next(self.log.read(TIER1, {partition: (offset, offset + 1)}))
        return admit_dense(record, self.chain.state(), self.chain.trusted)

    def cut(self, max_updates: int = 1000) -> Cut:
        """Cut everything that has arrived."""
        return take_cut(self.log, self.chain.state(), min_updates=1, max_wait_s=0, max_updates=max_updates)

    def admit(self, cut: Cut) -> Admission:
        """Admit the records of a cut on the current head."""
        return admit(
            read_cut(self.log, cut),
            self.chain.state(),
            devices=self.devices,
            settings=self.settings,
            payloads=self.payloads,
            archive=self.archive,
        )

    def fold(self, inputs: Cut | DenseInput | list[DenseInput], rates: Rates | None = None) -> Candidate:
        """Fold a cut, a dense update or a round of dense updates on the current head."""
        if isinstance(inputs, Cut):
            arguments = (Inputs(cut=inputs), self.admit(inputs))
        else:
            arguments = (Inputs.of_round(inputs if isinstance(inputs, list) else [inputs]),)
        return fold_candidate(
            self.chain.state().head,
            *arguments,
            rates=rates or Rates(),
            settings=self.settings,
            blobs=self.blobs,
            archive=self.archive,
            trainer="trainer",
            authorisation="policy-1",
        )

    def settle(
        self, candidate: Candidate, gate: Callable[[Candidate], GateRecord] | None = None, max_tries: int = 3
    ) -> Settlement:
        """Gate and commit a candidate."""
        return settle(
            candidate,
            chain=self.chain,
            gate=gate or passing_gate,
            fold=partial(refold, candidate, blobs=self.blobs, archive=self.archive),
            save=partial(save_candidate, self.home),
            max_tries=max_tries,
            now=lambda: "2026-01-02T00:00:00+00:00",
        )

    def advance(self) -> Settlement:
        """Cut, fold and settle."""
        return self.settle(self.fold(self.cut()))

    def decide(self, verdict: str, version: int) -> Sealed:
        """Append a person's decision."""
        state = self.chain.state()
        body = Decision(
            verdict=verdict,
            version=version,
            manifest=state.versions[version].digest,
            approver="secops",
            verified=True,
            channel="token",
            reason="a test",
            authorisation="policy-2",
            lineage=[],
            created_at="2026-01-03T00:00:00+00:00",
        )
        return self.chain.append(body, state.next_seq)


def gate_record(candidate: Candidate, passed: bool) -> GateRecord:
    """Return a gate result about `candidate`."""
    rows = [SuiteChange(suite="all", before=1.0, after=1.0 if passed else 9.0, bound=0.1, passed=passed)]
    return GateRecord(candidate=candidate.digest(), passed=passed, reason="measured", rows=rows)


def passing_gate(candidate: Candidate) -> GateRecord:
    """Pass everything."""
    return gate_record(candidate, True)

"""The product's path, whole: encode → outbox → log → cut → admit → fold, as a device and tier 1 run it.

Device: `sidecar.make_update` (floor, clip, rounding, signature), the durable outbox, `drain` to a real Kafka broker
with the payload in the blob store (claim check). Tier 1: `take_cut`, `read_cut`, `admit` (signature, strict parser,
norms, archive) and `fold_candidate` (decode, spool, clip, weigh, fold, new slices stored durably). A peer's path ends
with averaged factors in memory; ours ends with the new model on disk.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cramjam
import numpy as np
from safetensors.numpy import save

from benchmarks.aggregation.workload import Shape
from fednested_lib.blobs import BlobStore
from fednested_lib.delta import Delta, Encoding
from fednested_lib.envelope import INLINE_LIMIT_BYTES, AdapterFields, Envelope, make_envelope
from fednested_lib.log import TOPICS, UPDATES, UpdateLog
from fednested_lib.outbox import Outbox, drain
from fednested_lib.sidecar import make_update
from fednested_lib.signing import Signer, sha256_hex
from fednested_lib.snapshot import SLICE_TENSOR, encode_blob, read_slice, slice_key
from fednested_lib.spool import Declaration
from tests.policies import make_policy
from tier1.aggregation.fold import numeric_profile
from tier1.config import DeviceRecord
from tier1.versions.admission import Admission, admit
from tier1.versions.build import fold_candidate
from tier1.versions.chain import Chain
from tier1.versions.cut import read_cut, take_cut
from tier1.versions.manifest import Candidate, Genesis, Inputs
from tier1.versions.settings import AggregationSettings, Rates
from tier1.versions.state import ChainState

FEDERATION, TOKENS, OUTBOX_BYTES = "bench", 4096, 1 << 30
COMMITTER = Signer.from_seed(b"\x01" * 32)
NO_CLIP = 1e12


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One run of the path: what was folded, wall seconds by phase, bytes of the largest update and its envelope."""

    candidate: Candidate
    admission: Admission
    seconds: dict[str, float]
    sent_bytes: int

    @property
    def total_s(self) -> float:
        """All phases."""
        return sum(self.seconds.values())


class Federation:
    """A federation over one broker: base model, registered clients, stores and outboxes in a directory.

    Args:
        home: scratch directory.
        shape: of model and adapters.
        n_clients: registered devices.
        log: where updates go.
        settings: aggregation; the weighted mean without a clip by default, which is what FedAvg does.
    """

    def __init__(
        self,
        home: Path,
        shape: Shape,
        n_clients: int,
        log: UpdateLog,
        settings: AggregationSettings | None = None,
    ):
        self.shape, self.log = shape, log
        self.settings = settings or AggregationSettings(max_norm=NO_CLIP)
        self.blobs, self.payloads, self.archive = (BlobStore(home / name) for name in ("blobs", "payloads", "archive"))
        self.chain = Chain(home / "chain", signer=COMMITTER, trusted={COMMITTER.public_key: "committer"})
        self.signers = {f"client-{i}": Signer.from_seed(bytes([i + 2]) * 32) for i in range(n_clients)}
        self.outboxes = {name: Outbox(home / "outbox" / name, max_bytes=OUTBOX_BYTES) for name in self.signers}
        self.devices = {name: DeviceRecord(public_key=key.public_key) for name, key in self.signers.items()}
        self.sequence = 0
        self.log.create_topics(TOPICS)
        self._genesis()

    @cached_property
    def state(self) -> ChainState:
        """The chain after genesis; every pass folds on it."""
        return self.chain.state()

    def run(
        self, deltas: Sequence[Delta], encoding: Encoding = "int8", *, beside: Sequence[tuple[Envelope, bytes]] = ()
    ) -> Pass:
        """Send the updates of the first clients, one each, and fold them.

        Args:
            deltas: of the first clients.
            encoding: of their payloads.
            beside: updates that somebody else has made, sent with these.
        """
        starts = {str(partition): high for partition, (_, high) in self.log.watermarks(UPDATES).items()}
        state = replace(self.state, offsets=starts, claims={})
        seconds: dict[str, float] = {}
        mark = time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal mark
            now = time.perf_counter()
            seconds[phase], mark = now - mark, now

        envelopes = [self._send(name, delta, encoding) for name, delta in zip(self.signers, deltas, strict=False)]
        for envelope, payload in beside:
            self._put(envelope, payload)
        lap("encode")
        for outbox in self.outboxes.values():
            report = drain(outbox, self.log, self.payloads, now=time.time, rng=random.Random(0), sleep=time.sleep)
            assert (report.left, report.dead) == (0, ()), report
        lap("log")
        n_sent = len(deltas) + len(beside)
        cut = take_cut(self.log, state, min_updates=n_sent, max_wait_s=30, max_updates=n_sent)
        records = read_cut(self.log, cut)
        lap("read")
        admission = admit(
            records,
            state,
            devices=self.devices,
            settings=self.settings,
            payloads=self.payloads,
            archive=self.archive,
        )
        lap("admit")
        candidate = fold_candidate(
            state.head,
            Inputs(cut=cut),
            admission,
            rates=Rates(),
            settings=self.settings,
            blobs=self.blobs,
            archive=self.archive,
            trainer="bench",
            authorisation="none",
        )
        lap("aggregate")
        self.sequence += 1
        for outbox in self.outboxes.values():
            outbox.confirm([item.update_id for item in outbox.unconfirmed()])
        return Pass(
            candidate=candidate,
            admission=admission,
            seconds=seconds,
            sent_bytes=max(envelope.payload_bytes + len(envelope.to_bytes()) for envelope in envelopes),
        )

    def step(self, candidate: Candidate, name: str, expert: int) -> np.ndarray:
        """Return what the fold added to one expert matrix, fp64."""
        key = slice_key(name, expert)
        before, after = (
            read_slice(key, blobs[key], self.blobs)[SLICE_TENSOR].astype(np.float64)
            for blobs in (self.state.head.blobs, candidate.blobs)
        )
        return after - before

    def close(self) -> None:
        """Let go of the outboxes."""
        for outbox in self.outboxes.values():
            outbox.close()

    def make(self, name: str, delta: Delta, encoding: Encoding = "int8") -> tuple[Envelope, bytes]:
        """Make what the device `name` sends."""
        ids = {str(layer): list(self.shape.adapted(layer)) for layer in range(self.shape.layers)}
        counts = {layer: [TOKENS] * len(experts) for layer, experts in ids.items()}
        declaration = Declaration(
            sequence=self.sequence,
            base_version=0,
            base_digest=self.state.head.base_digest,
            adapter=AdapterFields(rank=delta.spec.rank, alpha=delta.spec.alpha),
            expert_ids=ids,
            routed_tokens=counts,
            distinct_tokens=counts,
            num_examples=TOKENS,
            factors_sha256="0" * 64,
        )
        made = make_update(
            declaration,
            delta,
            policy=make_policy(max_norm=NO_CLIP),
            encoding=encoding,
            federation=FEDERATION,
            client_id=name,
            key_epoch=0,
            signer=self.signers[name],
        )
        return made.envelope, made.payload

    def broken(self, name: str, delta: Delta) -> tuple[Envelope, bytes]:
        """Make what a hostile device sends that has no sidecar: a well-formed, signed update of NaN alone."""
        envelope, _ = self.make(name, delta, "fp32")
        tensors = {
            f"{param}.{factor}": np.full_like(getattr(factors, factor), np.nan)
            for param, factors in delta.factors.items()
            for factor in ("lora_a", "lora_b")
        }
        payload = bytes(cramjam.zstd.compress(save(tensors)))
        digest = sha256_hex(payload)
        fields = envelope.model_dump(mode="json", exclude={"update_id", "signature"})
        fields |= {"payload_sha256": digest, "payload_bytes": len(payload), "payload_uri": None}
        if len(payload) > INLINE_LIMIT_BYTES:
            fields["payload_uri"] = f"blob:{digest}"
        return make_envelope(self.signers[name], **fields), payload

    def _send(self, name: str, delta: Delta, encoding: Encoding) -> Envelope:
        envelope, payload = self.make(name, delta, encoding)
        self._put(envelope, payload)
        return envelope

    def _put(self, envelope: Envelope, payload: bytes) -> None:
        self.outboxes[envelope.client_id].put(
            sequence=envelope.sequence,
            update_id=envelope.update_id,
            topic=UPDATES,
            key=envelope.client_id.encode(),
            payload=payload,
            envelope=envelope.to_bytes(),
        )

    def _genesis(self) -> None:
        """Write version 0: every expert matrix zero, so that the fold's step is read without rounding."""
        zeros = {
            dims: self.blobs.put(encode_blob({SLICE_TENSOR: np.zeros(dims, np.float32)}))
            for dims in {(d_out, d_in) for _, d_out, d_in in self.shape.params.values()}
        }
        blobs = {
            slice_key(name, expert): zeros[d_out, d_in]
            for name, (n_experts, d_out, d_in) in self.shape.params.items()
            for expert in range(n_experts)
        }
        core = {"core/rest": self.blobs.put(encode_blob({"w": np.zeros(1, np.float32)}))}
        body = Genesis(
            federation=FEDERATION,
            family="qwen3_moe",
            model=self.shape.model,
            tokenizer=self.blobs.put(b"{}"),
            blobs=blobs | core,
            profile=numeric_profile(),
            trainer="bench",
            created_at="2026-01-01T00:00:00+00:00",
        )
        self.chain.append(body, 0)

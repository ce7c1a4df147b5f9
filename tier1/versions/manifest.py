"""The documents of the manifest chain, the only source of truth.

    version_{n+1} = F(chain_{≤n}, inputs_n, config)

The chain is a sequence of signed entries `chain/<seq>.json`; `prev` is the SHA-256 of the previous file's bytes, so an
entry cannot be altered, removed or re-ordered without breaking the rest. Five kinds:

- `genesis`    the first snapshot, version 0;
- `version`    head advanced: parent, inputs, every accepted update with its weight, every refused one with its reason,
               the recorded tries, and the digest of every resulting blob;
- `rejection`  inputs that the automatic gate refused for good: spent, never folded, no version number;
- `decision`   a person (or nobody verified) approved or rejected a version;
- `log`        an operator accepted a log that lost or re-used offsets, or another one, and from where cuts go on.

Head and champion are derived from these (`chain.ChainState`); no other place knows them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_serializer, model_validator

from fednested_lib.envelope import ClientId, Digest
from fednested_lib.signing import HEX64, canonical_json, sha256_hex
from tier1.versions.document import Document, GrownDocument
from tier1.versions.settings import AggregationSettings, Rates

Name = Annotated[str, Field(max_length=200)]
Offsets = dict[str, Annotated[int, Field(ge=0)]]  # partition (as text) -> next offset to consume
PublicKey = Annotated[str, Field(pattern=HEX64)]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Cut(GrownDocument):
    """Half-open offset ranges of one topic, bound to the log they were read from.

    Args:
        topic: topic name.
        log_id: cluster id and topic identity, so that another log cannot answer for this one.
        ranges: partition → (start, end), end exclusive.
        records_digest: digest over the record digests in partition and offset order.
        n_records: number of records in the ranges.
        generation: how many times an operator had accepted another log; offsets of two generations say nothing about
            each other.
    """

    later: ClassVar[frozenset[str]] = frozenset({"generation"})

    topic: str
    log_id: str
    ranges: dict[str, tuple[int, int]]
    records_digest: Digest
    n_records: int = Field(ge=0)
    generation: int = Field(default=0, ge=0)


class Accepted(GrownDocument):
    """One folded device update: who, from which base, and the weight it got."""

    later: ClassVar[frozenset[str]] = frozenset({"trust", "cosine", "distance"})

    update_id: Digest
    client_id: ClientId
    key_epoch: int
    sequence: int
    base_version: int
    staleness: int = Field(ge=0)
    partition: int
    offset: int
    record_sha256: Digest  # digest of the log record
    envelope_sha256: Digest  # archived envelope bytes in archive/
    payload_sha256: Digest  # archived payload bytes in archive/
    payload_bytes: int
    public_key: PublicKey  # the registered device key that signed the envelope
    tokens: int = Field(ge=0)  # declared tokens, summed over layers and experts
    norm: float = Field(ge=0)  # ‖ΔW‖_F over all experts it covers, before clipping
    clip: float = Field(ge=0, le=1)  # k_d
    weight: float = Field(ge=0)  # ω_d, mean over the experts it covers
    experts: int = Field(ge=0)  # (layer, expert) pairs it covers: declared with tokens > 0
    trust: float | None = Field(default=None, ge=0, le=1)  # from the chain's history; None: reputation is off
    # Against the aggregate Σ a·k·ΔW before mass, over the experts it covers; None: not measured.
    cosine: float | None = Field(default=None, ge=-1, le=1)
    distance: float | None = Field(default=None, ge=0)  # ‖k·ΔW − aggregate‖_F


class Refused(Document):
    """One refused record and the machine-readable reason."""

    partition: int
    offset: int
    record_sha256: Digest
    reason: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
    detail: Annotated[str, Field(max_length=400)]
    client_id: str | None = None
    sequence: int | None = None
    update_id: str | None = None


class DenseUpdate(GrownDocument):
    """What a tier-1 training run says about its dense delta; the value of its record on `updates.tier1`."""

    later: ClassVar[frozenset[str]] = frozenset({"fisher", "fisher_decay"})

    format: Literal["fednested.dense/1"] = "fednested.dense/1"
    update_id: Digest
    run_id: Name
    base_version: int = Field(ge=0)
    base_digest: Digest
    blobs: dict[str, Digest]  # slice key -> digest of the fp32 delta slice in archive/
    steps: int = Field(ge=0)
    tokens: int = Field(ge=0)
    dataset_digest: Digest
    trainer: Name
    signer: PublicKey
    signature: Signature
    fisher: dict[str, Digest] = {}  # slice key -> digest of the run's own Fisher information in archive/; with EWC
    fisher_decay: float = Field(default=1.0, ge=0, le=1)  # what the runs before it still count, where it has one

    def content_id(self) -> str:
        """Derive the update id from everything but itself and the signature."""
        fields = set(DenseUpdate.model_fields) - {"update_id", "signature"}
        return sha256_hex(canonical_json(self.model_dump(mode="json", include=fields)))


class DenseInput(DenseUpdate):
    """A dense update and where in the log it lies: an input like any other, by claim check."""

    topic: str
    partition: int = Field(ge=0)
    offset: int = Field(ge=0)


class Inputs(GrownDocument):
    """What one version consumed: a device cut, or the dense updates of a round in the order of their ids."""

    later: ClassVar[frozenset[str]] = frozenset({"others"})

    cut: Cut | None = None
    dense: DenseInput | None = None
    others: list[DenseInput] = []  # of the same round, from other clusters

    @model_validator(mode="after")
    def _exactly_one(self) -> Inputs:
        if (self.cut is None) == (self.dense is None):
            raise ValueError("inputs must be exactly one of cut and dense")
        ids = [dense.update_id for dense in self.round]
        if (self.others and self.dense is None) or any(a >= b for a, b in pairwise(ids)):
            raise ValueError("dense updates of a round must differ and stand in the order of their ids")
        return self

    @classmethod
    def of_round(cls, updates: Iterable[DenseInput]) -> Inputs:
        """Return the inputs that a round of dense updates, in any order, makes."""
        first, *others = sorted(updates, key=lambda dense: dense.update_id)
        return cls(dense=first, others=others)

    @property
    def round(self) -> list[DenseInput]:
        """The dense updates that are folded together; empty for a cut."""
        return [] if self.dense is None else [self.dense, *self.others]

    def id(self) -> str:
        """Name the inputs, so that a second run of the same inputs is recognised."""
        document = {"cut": self.cut and self.cut.model_dump(mode="json"), "dense": self.dense and self.dense.update_id}
        others = {"others": [dense.update_id for dense in self.others]} if self.others else {}
        return sha256_hex(canonical_json({**document, **others}))

    def parts(self) -> list[str]:
        """Return what each dense update of a round would be called if it were folded alone."""
        return [Inputs(dense=dense).id() for dense in self.round] if self.others else []


class NumericProfile(Document):
    """What "identical bytes" is promised for: another profile is compared, not equated."""

    torch: str
    instruction_set: str
    dtype: str = "float32"
    threads: int = 1


Interval = tuple[float, float]


class SuiteChange(GrownDocument):
    """One row of the gate's regression table; losses in nats per token, intervals of 95 % (`evaluation/bootstrap.py`).

    Args:
        suite: its name.
        suite_digest: of its file; None in records of before it was kept.
        before: loss of the parent; None: missing or not finite.
        after: loss of the candidate.
        bound: largest allowed rise.
        passed: the verdict.
        judged_by: the rise, or the end of its interval, that was held against the bound.
        after_interval: of the candidate's loss.
        change_interval: of the rise, paired by rows.
        accuracy: share of next tokens that the candidate guesses.
        accuracy_interval: of it.
        completions: share of completions that it would write itself; None for a suite without.
        completions_interval: of it.
        worst_lines: of a failed suite's file, where the rows with the largest rises begin.
    """

    later: ClassVar[frozenset[str]] = frozenset(
        {"judged_by", "after_interval", "change_interval", "accuracy", "accuracy_interval"}
        | {"completions", "completions_interval", "worst_lines", "suite_digest"}
    )

    suite: str
    before: float | None
    after: float | None
    bound: float
    passed: bool
    judged_by: Literal["low", "mean", "high"] = "mean"
    after_interval: Interval | None = None
    change_interval: Interval | None = None
    accuracy: float | None = None
    accuracy_interval: Interval | None = None
    completions: float | None = None
    completions_interval: Interval | None = None
    worst_lines: list[int] = Field(default_factory=list)
    suite_digest: Digest | None = None


class GateRecord(Document):
    """Result of the automatic gate, bound to the candidate's digest."""

    candidate: Digest
    passed: bool
    reason: str
    rows: list[SuiteChange]


class Try(Document):
    """One recorded attempt to fold the same inputs."""

    rates: Rates
    parent: Digest
    candidate: Digest
    outcome: Literal["passed", "gate_failed", "lost_race"]
    gate: GateRecord | None = None


class Candidate(GrownDocument):
    """A folded version that waits for its gate; F's output. Content addressed by `digest()` of its canonical JSON."""

    later: ClassVar[frozenset[str]] = frozenset({"outer", "fisher"})

    kind: Literal["candidate"] = "candidate"
    parent: Digest  # digest of the parent's chain entry
    parent_version: int
    inputs: Inputs
    accepted: list[Accepted]
    refused: list[Refused]
    rates: Rates
    settings: AggregationSettings
    code_version: str
    profile: NumericProfile
    family: str
    model: dict
    tokenizer: Digest
    blobs: dict[str, Digest]
    trainer: str  # identity that ran the fold or the training
    authorisation: str  # id of the policy decision
    lineage: list[str]  # ids in the lineage outbox
    outer: dict[str, Digest] = {}  # slice key, or tier1/<slice key> -> state of an outer optimiser; absent: none yet
    fisher: dict[str, Digest] = {}  # slice key -> Fisher information of all runs with EWC so far; absent: none yet


class Genesis(Document):
    """The first snapshot; `offsets` is where the device topic stood: what lies before is another chain's history."""

    kind: Literal["genesis"] = "genesis"
    version: Literal[0] = 0
    federation: Name
    family: str
    model: dict
    tokenizer: Digest
    blobs: dict[str, Digest]
    profile: NumericProfile
    trainer: str
    offsets: Offsets = {}
    created_at: str

    @model_serializer(mode="wrap")
    def _without_empty_offsets(self, serialise):
        """Leave `offsets` out where there are none: entries written before there was the field keep their bytes."""
        return {name: value for name, value in serialise(self).items() if name != "offsets" or value}


class Version(Document):
    """Head advanced to `version`."""

    kind: Literal["version"] = "version"
    version: int = Field(ge=1)
    candidate: Candidate
    tries: list[Try]
    offsets: Offsets  # next offset of updates.experts.local per partition, after this entry
    created_at: str


class Rejection(Document):
    """Inputs refused by the automatic gate after the last try: spent, recorded, never folded."""

    kind: Literal["rejection"] = "rejection"
    candidate: Candidate
    tries: list[Try]
    reason: str
    offsets: Offsets
    created_at: str


class Decision(Document):
    """A decision on a version, bound to the digest of its chain entry."""

    kind: Literal["decision"] = "decision"
    verdict: Literal["approve", "reject"]
    version: int
    manifest: Digest  # digest of the decided entry
    approver: Name
    verified: bool  # False: a bare console value, identity unverified
    channel: Literal["token", "console", "flag"]
    reason: Annotated[str, Field(max_length=400)]
    token_sha256: Digest | None = None
    authorisation: str
    lineage: list[str]
    refolded: list[Digest] = []  # entries whose inputs must be folded again because this rejection voids them
    created_at: str


class LogAccepted(Document):
    """The update log as it is now is accepted: cuts go on at `offsets`, from `generation` on.

    Of what the chain consumed, the log no longer answers for [offsets, consumed) of each partition; the archive does.
    """

    kind: Literal["log"] = "log"
    generation: int = Field(ge=1)
    topic: str
    log_id: str
    offsets: Offsets
    consumed: Offsets  # where the chain stood in the log before
    operator: Name
    authorisation: str
    reason: Annotated[str, Field(max_length=400)]
    created_at: str


Body = Annotated[Genesis | Version | Rejection | Decision | LogAccepted, Field(discriminator="kind")]


class Entry(Document):
    """One file of the chain."""

    format: Literal["fednested.chain/1"] = "fednested.chain/1"
    seq: int = Field(ge=0)
    prev: Digest | None  # None for genesis only
    body: Body
    signer: PublicKey
    signature: Signature

    def signed_part(self) -> bytes:
        """Return the bytes that the signature covers."""
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}))

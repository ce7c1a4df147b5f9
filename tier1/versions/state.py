"""What the chain says now: versions, head, champion, consumed inputs. A pure function of its entries.

    head      the newest version that is not voided
    champion  the newest approved version that is not voided; genesis until there is one
    voided    a version that a person rejected, and every version built on it

Inputs are spent by the entry that consumed them: a version, an automatic rejection, or a version a person rejected.
Inputs of a version that is voided only because an ancestor was rejected are *pending*: they are folded again, on what
is head then, as a version with a new number. While they are pending, their updates count as not seen.

A log that an operator accepted in place of one that lost records is a new *generation*: offsets go on where that entry
says, claims stay, so what devices send again is either new or a duplicate.

`derive` also checks what a signature cannot: that every version is built on the head of its time, that offsets continue
where they ended, that nothing is consumed twice. So a chain that derives has every update in it exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple, Protocol

from fednested_lib.errors import ChainCorrupt
from fednested_lib.snapshot import SnapshotManifest
from tier1.versions.manifest import (
    Accepted,
    Candidate,
    Cut,
    Decision,
    DenseInput,
    Entry,
    Genesis,
    Inputs,
    LogAccepted,
    Refused,
    Rejection,
    Version,
)

Claim = tuple[str, int, int]  # (client, key epoch, sequence number)


class Sealed(NamedTuple):
    """A verified entry and the digest of its file's bytes."""

    entry: Entry
    digest: str

    @property
    def name(self) -> str:
        """File name in the chain directory."""
        return file_name(self.entry.seq)


def file_name(seq: int) -> str:
    """Return the file name of the entry at position `seq`."""
    return f"{seq:06d}.json"


@dataclass(frozen=True, kw_only=True)
class VersionView:
    """One version: a node of the tree that the fold builds on.

    Args:
        version: its number.
        seq: position of its entry.
        digest: digest of its entry.
        parent: the version it is built on; None for genesis.
        family: model family.
        model: transformers config.
        tokenizer: digest of the tokenizer blob.
        blobs: slice key → digest.
        outer: slice key → digest of the outer optimiser's state.
        fisher: slice key → digest of the Fisher information of the core updates up to here; empty: none had EWC.
        accepted: rows of the updates that it folded; with `refused` what reputation is derived from.
        refused: rows of the records that it refused.
        dense: the tier-1 delta that it folded, if it folded one; of a round the first.
    """

    version: int
    seq: int
    digest: str
    parent: VersionView | None = field(repr=False, compare=False)
    family: str
    model: dict
    tokenizer: str
    blobs: Mapping[str, str]
    outer: Mapping[str, str] = field(default_factory=dict, repr=False)
    fisher: Mapping[str, str] = field(default_factory=dict, repr=False)
    accepted: Sequence[Accepted] = field(default=(), repr=False, compare=False)
    refused: Sequence[Refused] = field(default=(), repr=False, compare=False)
    dense: DenseInput | None = field(default=None, repr=False, compare=False)

    @cached_property
    def snapshot(self) -> SnapshotManifest:
        """The snapshot that devices train on."""
        return SnapshotManifest(
            version=self.version,
            family=self.family,
            model_config=self.model,
            tokenizer=self.tokenizer,
            blobs=dict(self.blobs),
        )

    @property
    def base_digest(self) -> str:
        """Digest that an update trained on this version names."""
        return self.snapshot.digest

    def staleness(self, base_version: int) -> int:
        """Return τ: how many versions of this lineage are newer than `base_version`."""
        return sum(1 for _ in takewhile(lambda view: view.version > base_version, self.lineage()))

    def lineage(self) -> Iterator[VersionView]:
        """Yield this version, its parent, and so on down to genesis; numbers fall strictly."""
        view: VersionView | None = self
        while view is not None:
            yield view
            view = view.parent

    def descends_from(self, version: int) -> bool:
        """Tell whether `version` is this version or one it is built on."""
        return any(view.version == version for view in takewhile(lambda view: view.version >= version, self.lineage()))


@dataclass(frozen=True, kw_only=True)
class ChainState:
    """Everything the loops need to know about the chain.

    Args:
        seq: position of the last entry.
        federation: name of the federation, from genesis.
        digest: digest of the last entry's file; with `seq` it is the anchor of the chain.
        versions: every version ever, by number.
        voided: versions that no longer count.
        rejected: versions that a person rejected.
        approved: versions that were approved.
        offsets: partition → next offset of the device topic to consume.
        log: (topic, identity) of the log that cuts are taken from; None before the first.
        generation: how many times an operator accepted another log.
        records: partition → offset → digest of every record that was consumed from this log.
        claims: (client, key epoch, sequence) → id of the update that was folded or spent.
        spent: inputs id → position of the entry that consumed them; of a round also the ids of its parts.
        pending: voided versions whose inputs are to be folded again, oldest first.
    """

    seq: int
    federation: str
    digest: str
    versions: Mapping[int, VersionView]
    voided: frozenset[int]
    rejected: frozenset[int]
    approved: frozenset[int]
    offsets: Mapping[str, int]
    log: tuple[str, str] | None
    generation: int
    records: Mapping[str, Mapping[int, str]] = field(repr=False)
    claims: Mapping[Claim, str]
    spent: Mapping[str, int]
    pending: tuple[Sealed, ...]

    @property
    def next_seq(self) -> int:
        """Position of the entry to be appended."""
        return self.seq + 1

    @property
    def last_records(self) -> dict[str, tuple[int, str]]:
        """Partition → offset and digest of the last record that was consumed from it."""
        ends = {partition: end - 1 for partition, end in self.offsets.items()}
        return {
            partition: (offset, self.records[partition][offset])
            for partition, offset in ends.items()
            if offset in self.records.get(partition, {})
        }

    @property
    def head(self) -> VersionView:
        """The newest version that is not voided."""
        return self.versions[max(set(self.versions) - self.voided)]

    @property
    def champion(self) -> VersionView:
        """The newest approved version that is not voided; genesis until there is one."""
        return self.versions[max((self.approved | {0}) - self.voided)]

    def successors(self, version: int) -> list[VersionView]:
        """Return the versions that rejecting `version` voids with it, oldest first."""
        newer = sorted(number for number in self.versions if number > version and number not in self.voided)
        return [self.versions[number] for number in newer if self.versions[number].descends_from(version)]


def derive(entries: Iterable[Sealed]) -> ChainState:
    """Derive the state of a chain from its verified entries, genesis first.

    Raises:
        ChainCorrupt: an entry contradicts those before it; names the file and the contradiction.
    """
    ledger = _Ledger()
    for sealed in entries:
        ledger.apply(sealed)
    return ledger.state()


class _Ledger:
    """Accumulates entries in order."""

    def __init__(self):
        self.last: Sealed | None = None
        self.federation = ""
        self.sealed: dict[int, Sealed] = {}
        self.versions: dict[int, VersionView] = {}
        self.voided: set[int] = set()
        self.rejected: set[int] = set()
        self.approved: set[int] = set()
        self.offsets: dict[str, int] = {}
        self.log: tuple[str, str] | None = None
        self.generation = 0
        self.records: dict[str, dict[int, str]] = {}
        self.claims: dict[Claim, str] = {}
        self.spent: dict[str, int] = {}
        self.pending: dict[str, Sealed] = {}

    def apply(self, sealed: Sealed) -> None:
        body = sealed.entry.body
        if (self.last is None) != isinstance(body, Genesis):
            raise _contradiction(sealed, f"is a {body.kind} entry, but genesis and nothing else stands first")
        if isinstance(body, Genesis):
            self.federation, self.offsets = body.federation, dict(body.offsets)
            self._add(sealed, body.version, body, None)
        elif isinstance(body, Decision):
            self._decide(sealed, body)
        elif isinstance(body, LogAccepted):
            self._accept_log(sealed, body)
        else:
            self._consume(sealed, body)
        self.last = sealed

    def state(self) -> ChainState:
        assert self.last is not None, "a chain has a genesis"
        return ChainState(
            seq=self.last.entry.seq,
            federation=self.federation,
            digest=self.last.digest,
            versions=dict(self.versions),
            voided=frozenset(self.voided),
            rejected=frozenset(self.rejected),
            approved=frozenset(self.approved),
            offsets=dict(self.offsets),
            log=self.log,
            generation=self.generation,
            records={partition: dict(digests) for partition, digests in self.records.items()},
            claims=dict(self.claims),
            spent=dict(self.spent),
            pending=tuple(sorted(self.pending.values(), key=lambda sealed: sealed.entry.seq)),
        )

    def _add(self, sealed: Sealed, number: int, model: Genesis | Candidate, parent: VersionView | None) -> None:
        self.sealed[number] = sealed
        self.head = self.versions[number] = VersionView(
            version=number,
            seq=sealed.entry.seq,
            digest=sealed.digest,
            parent=parent,
            family=model.family,
            model=model.model,
            tokenizer=model.tokenizer,
            blobs=model.blobs,
            **({} if isinstance(model, Genesis) else history_of(model)),
        )

    def _consume(self, sealed: Sealed, body: Version | Rejection) -> None:
        candidate = body.candidate
        head = self.head
        if (candidate.parent, candidate.parent_version) != (head.digest, head.version):
            raise _contradiction(sealed, f"is built on {candidate.parent[:12]}, but version {head.version} was head")
        if isinstance(body, Version) and body.version != max(self.versions) + 1:
            raise _contradiction(sealed, f"has version {body.version}, must have {max(self.versions) + 1}")
        self._spend_inputs(sealed, candidate.inputs)
        if body.offsets != self.offsets:
            raise _contradiction(sealed, f"records offsets {body.offsets}, but the chain has consumed {self.offsets}")
        self._see(sealed, candidate)
        if isinstance(body, Version):
            self._add(sealed, body.version, candidate, head)

    def _spend_inputs(self, sealed: Sealed, inputs: Inputs) -> None:
        name = inputs.id()
        # The parts of a pending round stay spent: it is folded again as a whole.
        parts = [part for part in inputs.parts() if name not in self.pending]
        for part in (name, *parts):
            if part in self.spent:
                raise _contradiction(sealed, f"consumes the inputs of {file_name(self.spent[part])} again")
        if any(part in self.pending for part in parts):
            raise _contradiction(sealed, "consumes inputs that are to be folded again alone")
        if name not in self.pending and inputs.cut is not None:
            if not continues(self, inputs.cut):
                where = {partition: start for partition, (start, _) in inputs.cut.ranges.items()}
                raise _contradiction(
                    sealed,
                    f"consumes from {where} of log generation {inputs.cut.generation}, but the chain has consumed up "
                    f"to {self.offsets} of generation {self.generation}",
                )
            self.offsets = offsets_after(self.offsets, inputs.cut)
            self.log = (inputs.cut.topic, inputs.cut.log_id)
        self.pending.pop(name, None)
        self.spent.update(dict.fromkeys((name, *inputs.parts()), sealed.entry.seq))

    def _see(self, sealed: Sealed, candidate: Candidate) -> None:
        for update in candidate.accepted:
            claim = claim_of(update)
            if claim in self.claims:
                raise _contradiction(sealed, f"accepts sequence {update.sequence} of {update.client_id} a second time")
            self.claims[claim] = update.update_id
        cut = candidate.inputs.cut
        if cut is None or cut.generation != self.generation:  # folded again, from another log than today's
            return
        for record in (*candidate.accepted, *candidate.refused):
            self.records.setdefault(str(record.partition), {})[record.offset] = record.record_sha256

    def _accept_log(self, sealed: Sealed, body: LogAccepted) -> None:
        if (body.generation, body.consumed) != (self.generation + 1, self.offsets):
            raise _contradiction(
                sealed,
                f"accepts log generation {body.generation} after offsets {body.consumed}, but the chain has consumed "
                f"{self.offsets} of generation {self.generation}",
            )
        same = self.log == (body.topic, body.log_id)
        self.records = {
            partition: {offset: digest for offset, digest in digests.items() if offset < body.offsets.get(partition, 0)}
            for partition, digests in (self.records if same else {}).items()
        }
        self.log, self.generation, self.offsets = (body.topic, body.log_id), body.generation, dict(body.offsets)

    def _decide(self, sealed: Sealed, body: Decision) -> None:
        view = self.versions.get(body.version)
        if view is None or view.digest != body.manifest:
            raise _contradiction(
                sealed, f"decides on version {body.version} ({body.manifest[:12]}), which the chain does not have"
            )
        if body.verdict == "approve":
            self.approved.add(body.version)
            return
        if body.version == 0:
            raise _contradiction(sealed, "rejects genesis, on which everything is built")
        self.rejected.add(body.version)
        if body.version in self.voided:
            self._hold_back(body.version)
        for successor in [v for v in self.versions.values() if v.descends_from(body.version)]:
            if successor.version != body.version and successor.version not in self.voided:
                self._release(successor.version)
            self.voided.add(successor.version)
        self.head = self.versions[max(set(self.versions) - self.voided)]

    def _release(self, version: int) -> None:
        """Make the inputs of a voided version pending and its updates unseen."""
        sealed = self.sealed[version]
        candidate = sealed.entry.body.candidate
        name = candidate.inputs.id()
        del self.spent[name]
        self.pending[name] = sealed
        for update in candidate.accepted:
            del self.claims[claim_of(update)]

    def _hold_back(self, version: int) -> None:
        """Spend the pending inputs of a version that is now rejected itself."""
        candidate = self.sealed[version].entry.body.candidate
        name = candidate.inputs.id()
        if self.pending.get(name) != self.sealed[version]:
            return  # folded again already, as another version
        del self.pending[name]
        self.spent[name] = self.sealed[version].entry.seq
        for update in candidate.accepted:
            self.claims.setdefault(claim_of(update), update.update_id)


def history_of(candidate: Candidate) -> dict:
    """Return the fields of `VersionView` that later folds derive weights and steps from."""
    return {
        "outer": candidate.outer,
        "fisher": candidate.fisher,
        "accepted": tuple(candidate.accepted),
        "refused": tuple(candidate.refused),
        "dense": candidate.inputs.dense,
    }


def claim_of(update: Accepted) -> Claim:
    """Return what an update is unique in."""
    return update.client_id, update.key_epoch, update.sequence


class Place(Protocol):
    """Where a chain stands in the log."""

    offsets: Mapping[str, int]
    generation: int


class Consumed(Place, Protocol):
    """A place in the log, and what shows that it is still the same log."""

    log: tuple[str, str] | None
    last_records: Mapping[str, tuple[int, str]]


def continues(place: Place, cut: Cut) -> bool:
    """Tell whether a cut starts where the chain ended; a partition never consumed may start anywhere."""
    return cut.generation == place.generation and all(
        place.offsets.get(partition, start) == start for partition, (start, _) in cut.ranges.items()
    )


def offsets_after(offsets: Mapping[str, int], cut: Cut) -> dict[str, int]:
    """Return the offsets of the chain after it consumed a cut."""
    return {**offsets, **{partition: end for partition, (_, end) in cut.ranges.items()}}


def _contradiction(sealed: Sealed, what: str) -> ChainCorrupt:
    return ChainCorrupt(
        f"chain entry {sealed.name} {what}: it was written past the committer; restore the chain from its anchor"
    )

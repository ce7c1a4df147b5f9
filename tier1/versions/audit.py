"""Audit: what a version was made of, who contributed with which weight, and what was refused why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fednested_lib.errors import ChainError
from tier1.versions.chain import Chain
from tier1.versions.manifest import Accepted, Candidate, Cut, DenseInput, Refused
from tier1.versions.state import ChainState


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One input of a version; a field that does not apply is None."""

    kind: Literal["accepted", "refused", "dense"]
    source: str  # topic[partition]@offset, and which log if an operator accepted another one
    update_id: str | None = None
    who: str | None = None
    sequence: int | None = None
    base_version: int | None = None
    staleness: int | None = None
    tokens: int | None = None
    norm: float | None = None
    clip: float | None = None
    weight: float | None = None
    trust: float | None = None  # from the chain's history, where reputation is on
    cosine: float | None = None  # to the aggregate, where it was measured
    distance: float | None = None  # from the aggregate, likewise
    payload_bytes: int | None = None
    reason: str | None = None
    detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One version: where it stands, what it is built on, and its inputs."""

    version: int
    manifest: str
    parent_version: int | None
    standing: tuple[str, ...]  # of head, champion, approved, rejected, voided
    trainer: str
    created_at: str
    tries: tuple[str, ...]
    rows: tuple[AuditRow, ...]


def audit(chain: Chain, version: int) -> Audit:
    """Return everything the chain says about one version.

    Raises:
        ChainError: the chain has no such version.
        ChainCorrupt: the chain is damaged.
    """
    state = chain.state()
    view = state.versions.get(version)
    if view is None:
        raise ChainError(f"version must be one of 0..{max(state.versions)}, got {version}")
    body = chain.entries()[view.seq].entry.body
    candidate = None if body.kind == "genesis" else body.candidate
    return Audit(
        version=version,
        manifest=view.digest,
        parent_version=None if view.parent is None else view.parent.version,
        standing=_standing(state, version),
        trainer=body.trainer if candidate is None else candidate.trainer,
        created_at=body.created_at,
        tries=() if candidate is None else tuple(one.outcome for one in body.tries),
        rows=() if candidate is None else rows_of(candidate),
    )


def _standing(state: ChainState, version: int) -> tuple[str, ...]:
    marks = {
        "head": version == state.head.version,
        "champion": version == state.champion.version,
        "approved": version in state.approved,
        "rejected": version in state.rejected,
        "voided": version in state.voided,
    }
    return tuple(name for name, holds in marks.items() if holds)


def rows_of(candidate: Candidate) -> tuple[AuditRow, ...]:
    """Return the inputs of a candidate, accepted before refused."""
    cut = candidate.inputs.cut
    if cut is None:
        return tuple(map(_dense, candidate.inputs.round))
    return (*(_accepted(cut, row) for row in candidate.accepted), *(_refused(cut, row) for row in candidate.refused))


def _source(cut: Cut, row: Accepted | Refused) -> str:
    which = f" of log {cut.generation}" if cut.generation else ""
    return f"{cut.topic}[{row.partition}]@{row.offset}{which}"


def _accepted(cut: Cut, row: Accepted) -> AuditRow:
    return AuditRow(
        kind="accepted",
        source=_source(cut, row),
        update_id=row.update_id,
        who=row.client_id,
        sequence=row.sequence,
        base_version=row.base_version,
        staleness=row.staleness,
        tokens=row.tokens,
        norm=row.norm,
        clip=row.clip,
        weight=row.weight,
        trust=row.trust,
        cosine=row.cosine,
        distance=row.distance,
        payload_bytes=row.payload_bytes,
    )


def _refused(cut: Cut, row: Refused) -> AuditRow:
    return AuditRow(
        kind="refused",
        source=_source(cut, row),
        update_id=row.update_id,
        who=row.client_id,
        sequence=row.sequence,
        reason=row.reason,
        detail=row.detail,
    )


def _dense(dense: DenseInput) -> AuditRow:
    return AuditRow(
        kind="dense",
        source=f"{dense.topic}[{dense.partition}]@{dense.offset}",
        update_id=dense.update_id,
        who=dense.trainer,
        base_version=dense.base_version,
        tokens=dense.tokens,
    )

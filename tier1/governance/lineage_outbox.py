"""The lineage outbox: DataHub proposals in a local JSONL, from which a shipper sends them (transactional outbox).

A training run neither fails nor waits because the catalogue is down: recording is an fsync of a few kilobytes, while
the catalogue's own client blocks for 28 s per call when its server is away. Promotion needs the record to be here.

One line is one proposal: `{id, event, kind, run_id, manifest_digest, part, parts, proposal}`. Ids are derived from
what an event is about (kind, run, manifest, entity, aspect), not from its times, so that a repeated run records nothing
twice; if a crash left half an event, its repetition adds the other half.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import structlog

from fednested_lib.errors import GovernanceError
from fednested_lib.signing import canonical_json, sha256_hex
from tier1.governance.journal import Journal
from tier1.governance.ports import LineageEvent

log = structlog.get_logger(__name__)

FIELDS = frozenset({"id", "event", "kind", "run_id", "manifest_digest", "part", "parts", "proposal"})


class LineageOutbox:
    """The file-backed `Lineage`.

    Args:
        path: the outbox JSONL.
    """

    def __init__(self, path: str | os.PathLike):
        self._journal = Journal(path)

    def record(self, event: LineageEvent) -> tuple[str, ...]:
        """Store the event's proposals that are not stored yet; return the ids of all of them.

        Raises:
            GovernanceError: the event has no proposals, or one is not a proposal.
            StorageError: the outbox cannot be written.
        """
        lines = _lines(event)
        ids = tuple(line["id"] for line in lines)

        def unknown(stored: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
            known = {record.get("id") for record in stored}
            return [line for line in lines if line["id"] not in known]

        self._journal.append_new(unknown)
        log.info("lineage.recorded", kind=event.kind, run_id=event.run_id, proposals=len(ids))
        return ids

    def has(self, *, run_id: str | None = None, manifest_digest: str | None = None) -> bool:
        """Tell whether the run, or the version with this manifest, is recorded completely; give exactly one of them.

        A promotion's own record counts for neither, since it says nothing about how the version came to be.
        """
        assert (run_id is None) != (manifest_digest is None), "has() takes a run_id or a manifest_digest"
        parts: dict[str, set[int]] = {}
        wanted: dict[str, int] = {}
        for record in self._records():
            about = record["run_id"] == run_id if run_id is not None else record["manifest_digest"] == manifest_digest
            if about and record["kind"] != "promotion":
                parts.setdefault(record["event"], set()).add(record["part"])
                wanted[record["event"]] = record["parts"]
        return bool(parts) and all(len(parts[event]) == wanted[event] for event in parts)

    def missing(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Return those of `ids` that are not in the outbox, in the order given."""
        known = {record["id"] for record in self._records()}
        return tuple(proposal_id for proposal_id in ids if proposal_id not in known)

    def proposals(self) -> Iterator[Mapping[str, Any]]:
        """Yield all stored proposals in the order in which they are to be shipped."""
        for record in self._records():
            yield record["proposal"]

    def _records(self) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(self._journal.read(), start=1):
            if FIELDS - record.keys():
                lacking = ", ".join(sorted(FIELDS - record.keys()))
                raise GovernanceError(
                    f"{self._journal.path} line {number} lacks {lacking}: the outbox was altered, restore it"
                )
            yield record


def _lines(event: LineageEvent) -> list[dict[str, Any]]:
    if not event.proposals:
        raise GovernanceError(
            f"lineage event {event.kind} of run {event.run_id} has no proposals: build it with lineage.py"
        )
    name = sha256_hex(canonical_json([event.kind, event.run_id, event.manifest_digest]))
    parts = len(event.proposals)
    return [
        {
            "id": sha256_hex(canonical_json([name, part, proposal["entityUrn"], proposal["aspectName"]])),
            "event": name,
            "kind": event.kind,
            "run_id": event.run_id,
            "manifest_digest": event.manifest_digest,
            "part": part,
            "parts": parts,
            "proposal": dict(proposal),
        }
        for part, proposal in enumerate(event.proposals)
    ]

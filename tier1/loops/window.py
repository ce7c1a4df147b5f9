"""The sensor's window over the device topic: when it closes, and which cut it gives.

    closed  ⇔  n ≥ K  or  bytes ≥ B  or  t − t_opened ≥ T

Bytes are those of the records and of the payloads that their claim checks declare.

Everything is a function of the window, the log and the time, so whoever looks may be killed at any moment and somebody
else may look next. A second look after the closing may see more records and give a larger cut: nothing is consumed
before a manifest says so. Shared by all sensors; reads the log, never the chain, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fednested_lib.envelope import HEADER, parse_envelope
from fednested_lib.errors import EnvelopeError
from fednested_lib.log import Record, UpdateLog
from tier1.loops.records import TakenCut, Window
from tier1.versions.cut import take_cut


@dataclass(frozen=True, kw_only=True)
class Look:
    """What waits in the window now; `closed_by` is `updates`, `bytes` or `time`, empty while it is open."""

    n_updates: int
    n_bytes: int
    waited_s: float
    closed_by: str
    window: Window

    def __str__(self) -> str:
        window = self.window
        parts = [f"{self.n_updates} of {window.min_updates} updates", f"{self.waited_s:.0f} of {window.max_wait_s:g} s"]
        if window.max_bytes is not None:
            parts.insert(1, f"{self.n_bytes} of {window.max_bytes} bytes")
        text = ", ".join(parts)
        if self.closed_by == "time" and self.n_updates == 0:
            text += ": nothing arrived; see that devices run and send, or raise window.max_wait_s"
        return text


class _Consumed(NamedTuple):
    """What `take_cut` asks of a chain's state, as the window carries it."""

    offsets: Mapping[str, int]
    generation: int
    log: tuple[str, str] | None
    last_records: Mapping[str, tuple[int, str]]


def closed_by(window: Window, *, n_updates: int, n_bytes: int, waited_s: float) -> str:
    """Return which bound closes the window, or an empty string while it stays open."""
    if n_updates >= window.min_updates:
        return "updates"
    if window.max_bytes is not None and n_bytes >= window.max_bytes:
        return "bytes"
    return "time" if waited_s >= window.max_wait_s else ""


def look(log: UpdateLog, window: Window, *, now: float) -> Look:
    """Look at the window once; `now` is in seconds since the epoch.

    Raises:
        LogError: the log is another one than before, lost records, or re-used offsets.
        TransportError: the log does not answer, or the topic does not exist.
    """
    ends = log.watermarks(window.topic)
    ranges = {partition: (window.offsets.get(str(partition), low), high) for partition, (low, high) in ends.items()}
    if any(end < start for start, end in ranges.values()):
        _cut(log, window, max_updates=0)  # names what the log lost
    n_updates = sum(end - start for start, end in ranges.values())
    n_bytes, waited_s = 0, now - window.opened_at
    if window.max_bytes is not None and n_updates < window.min_updates:  # so at most K records are read
        n_bytes = sum(_size_bytes(record) for record in log.read(window.topic, ranges))
    reason = closed_by(window, n_updates=n_updates, n_bytes=n_bytes, waited_s=waited_s)
    return Look(n_updates=n_updates, n_bytes=n_bytes, waited_s=waited_s, closed_by=reason, window=window)


def cut_window(log: UpdateLog, seen: Look) -> TakenCut:
    """Cut the log where a closed window ends now.

    Raises:
        LogError: the log is another one than before, lost records, or re-used offsets.
        TransportError: the log does not answer.
    """
    cut = _cut(log, seen.window, max_updates=seen.window.max_updates)
    return TakenCut(
        topic=cut.topic,
        log_id=cut.log_id,
        ranges={partition: list(bounds) for partition, bounds in cut.ranges.items()},
        records_digest=cut.records_digest,
        n_records=cut.n_records,
        generation=cut.generation,
        closed_by=seen.closed_by,
    )


def _cut(log: UpdateLog, window: Window, *, max_updates: int):
    consumed = _Consumed(
        offsets=window.offsets,
        generation=window.generation,
        log=(window.topic, window.log_id) if window.log_id else None,
        last_records={p: (offset, window.last_digests[p]) for p, offset in window.last_offsets.items()},
    )
    return take_cut(log, consumed, min_updates=1, max_wait_s=0, max_updates=max_updates, topic=window.topic)


def _size_bytes(record: Record) -> int:
    own = len(record.key) + len(record.value) + sum(len(name) + len(content) for name, content in record.headers)
    return own + _claimed_bytes(record)


def _claimed_bytes(record: Record) -> int:
    """Return the payload's size that a claim check's envelope declares, unverified; 0 if there is none to read."""
    if record.value:
        return 0
    try:
        envelope = parse_envelope(dict(record.headers).get(HEADER, b""))
    except EnvelopeError:
        return 0
    return envelope.payload_bytes if envelope.payload_uri is not None else 0

"""The update log: append, and read exactly the offsets that a cut names.

A version is a function of its parent and of half-open offset ranges of this log, so nothing here keeps a position:
no consumer group, no commit, no "since last time". `read` gives each range completely and in offset order or raises
`LogError`; the caller's manifest chain is the only record of what has been consumed. A record's partition is
crc32(key) mod partitions, in every implementation, so one device's updates stay in order.

`KafkaLog` (module `kafka_log`) speaks to any Kafka broker; `InMemoryLog` is its public twin for tests and
single-process runs and passes the same contract tests.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fednested_lib.errors import ConfigError, LogError, PayloadError, TransportError

if TYPE_CHECKING:
    from fednested_lib.kafka_log import KafkaLog as KafkaLog

CONTROL = "control.federation_rounds"  # signed events of tier 1
UPDATES = "updates.experts.local"  # device updates
DENSE = "updates.tier1"  # dense deltas of core updates
QUARANTINE = "updates.experts.quarantine"  # refused device updates, each with its reason
TELEMETRY = "telemetry.edge"
TASKS = "tasks.training"
DEAD_TASKS = "tasks.training.dead"  # tasks that can never be launched, each with its reason
TOPICS: dict[str, int] = {
    CONTROL: 1,  # one partition: total order
    UPDATES: 3,
    DENSE: 1,
    TELEMETRY: 1,
    TASKS: 1,
    DEAD_TASKS: 1,
    QUARANTINE: 1,
}

# Kafka brokers accept 1 MiB per batch by default; the rest is head-room for the batch's own framing.
MAX_RECORD_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of the log; `headers` is sorted by name.

    Timestamps are left out on purpose: a broker sets them, so a version must not depend on them.
    """

    topic: str
    partition: int
    offset: int
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over key, value and headers, each with its length, so that no two contents share their bytes."""
        parts = [self.key, self.value]
        for name, value in sorted(self.headers):
            parts += [name.encode(), value]
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).hexdigest()


def records_digest(records: Iterable[Record]) -> str:
    """Return the SHA-256 over (topic, partition, offset, record digest) of all records, in that order.

    The order in which the records are given does not matter; only digests are held, never the records.
    """
    lines = sorted((record.topic, record.partition, record.offset, record.digest) for record in records)
    sha = hashlib.sha256()
    for topic, partition, offset, digest in lines:
        sha.update(f"{topic}\t{partition}\t{offset}\t{digest}\n".encode())
    return sha.hexdigest()


class UpdateLog(Protocol):
    """What fednested asks of a log."""

    def create_topics(self, topics: Mapping[str, int]) -> None:
        """Create what is missing of name → number of partitions; what exists is left alone.

        Raises:
            ConfigError: a topic exists with another number of partitions.
            TransportError: the log does not answer.
        """

    def append(self, topic: str, *, key: bytes, value: bytes, headers: Mapping[str, bytes]) -> tuple[int, int]:
        """Append one record and return (partition, offset) once it is acknowledged.

        After a `TransportError` the record may or may not be in the log: send it again and dedupe by its id.

        Raises:
            PayloadError: the record is larger than `MAX_RECORD_BYTES` (reason ``record_too_large``).
            TransportError: no acknowledgement in time, or the topic does not exist (yet).
        """

    def read(self, topic: str, ranges: Mapping[int, tuple[int, int]]) -> Iterator[Record]:
        """Yield exactly the records of the half-open ranges, partition by partition, each in offset order.

        Raises:
            LogError: a named offset is not there: too old, beyond the end, or skipped.
            TransportError: the log does not answer.
        """

    def watermarks(self, topic: str) -> dict[int, tuple[int, int]]:
        """Return partition → (oldest offset kept, next offset to be written).

        Raises:
            TransportError: the log does not answer, or the topic does not exist (yet).
        """

    def identity(self, topic: str) -> str:
        """Name this topic of this log; a log that was replaced has another name, as far as its broker can tell."""

    def close(self) -> None:
        """Let go of connections."""


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition of `key` among `partitions` (crc32, the same in every implementation)."""
    return zlib.crc32(key) % partitions


def check_size(topic: str, key: bytes, value: bytes, headers: Mapping[str, bytes]) -> None:
    """Refuse a record that brokers refuse by default.

    Raises:
        PayloadError: reason ``record_too_large``.
    """
    size_bytes = len(key) + len(value) + sum(len(name.encode()) + len(content) for name, content in headers.items())
    if size_bytes > MAX_RECORD_BYTES:
        raise PayloadError(
            "record_too_large",
            f"record for {topic} must be at most {MAX_RECORD_BYTES} bytes, got {size_bytes}: send a claim check",
        )


def check_ranges(
    topic: str, ranges: Mapping[int, tuple[int, int]], watermarks: Mapping[int, tuple[int, int]], where: str
) -> None:
    """Check that the log `where` still has every offset of `ranges`.

    An empty range needs no record, so it may lie before what is kept, but never beyond the end.

    Raises:
        LogError: with topic, partition, the range and what the log has.
    """
    for partition, (start, end) in sorted(ranges.items()):
        what = f"{topic}[{partition}] of the log {where}: offsets [{start}, {end}) are named"
        if not 0 <= start <= end:
            raise LogError(
                f"{what}, but a range must be 0 <= start <= end: the manifest or state that names it is wrong"
            )
        if partition not in watermarks:
            raise LogError(f"{what}, but there is no such partition: connect the log they were taken from")
        low, high = watermarks[partition]
        if end > high:
            raise LogError(f"{what}, but it ends at {high}, records were lost: restore them or connect the right log")
        if start < low and start < end:
            raise LogError(f"{what}, but it begins at {low}, retention removed records: restore them from the archive")


def missing_topic(topic: str, where: str) -> TransportError:
    """Return the error for a topic that the log `where` does not have (yet, hence recoverable)."""
    return TransportError(
        f"topic {topic} does not exist on the log {where}: run `fednested messaging bootstrap-topics`"
    )


def check_partitions(topics: Mapping[str, int], existing: Mapping[str, int], where: str) -> None:
    """Check that topics that exist have the wanted number of partitions, which decides where keys go.

    Raises:
        ConfigError: one has not.
    """
    for topic, wanted in topics.items():
        found = existing.get(topic, wanted)
        if found != wanted:
            raise ConfigError(
                f"topic {topic} on the log {where} must have {wanted} partition(s), got {found}: "
                "delete it or connect another log"
            )


class InMemoryLog:
    """An `UpdateLog` in this process, safe for threads.

    Attributes:
        reachable: set it to False and every call raises `TransportError`, as an unreachable broker would.
    """

    def __init__(self, *, name: str | None = None):
        self.name = name or f"memory-{uuid.uuid4().hex}"
        self.reachable = True
        self._lock = threading.Lock()
        self._records: dict[str, list[list[Record]]] = {}
        self._low: dict[str, list[int]] = {}

    def create_topics(self, topics: Mapping[str, int]) -> None:
        """See `UpdateLog.create_topics`."""
        self._check_reachable()
        with self._lock:
            check_partitions(topics, {topic: len(partitions) for topic, partitions in self._records.items()}, self.name)
            for topic, partitions in topics.items():
                self._records.setdefault(topic, [[] for _ in range(partitions)])
                self._low.setdefault(topic, [0] * partitions)

    def append(self, topic: str, *, key: bytes, value: bytes, headers: Mapping[str, bytes]) -> tuple[int, int]:
        """See `UpdateLog.append`."""
        check_size(topic, key, value, headers)
        self._check_reachable(topic)
        with self._lock:
            partition = partition_of(key, len(self._records[topic]))
            offset = self._low[topic][partition] + len(self._records[topic][partition])
            record = Record(
                topic=topic,
                partition=partition,
                offset=offset,
                key=key,
                value=value,
                headers=tuple(sorted(headers.items())),
            )
            self._records[topic][partition].append(record)
        return partition, offset

    def read(self, topic: str, ranges: Mapping[int, tuple[int, int]]) -> Iterator[Record]:
        """See `UpdateLog.read`."""
        watermarks = self.watermarks(topic) if topic in self._records else {}
        check_ranges(topic, ranges, watermarks, self.name)
        for partition, (start, end) in sorted(ranges.items()):
            with self._lock:
                low = self._low[topic][partition]
                records = self._records[topic][partition][start - low : end - low] if start < end else []
            yield from records

    def watermarks(self, topic: str) -> dict[int, tuple[int, int]]:
        """See `UpdateLog.watermarks`."""
        self._check_reachable(topic)
        with self._lock:
            lows = self._low[topic]
            return {
                partition: (lows[partition], lows[partition] + len(records))
                for partition, records in enumerate(self._records[topic])
            }

    def identity(self, topic: str) -> str:
        """See `UpdateLog.identity`."""
        self._check_reachable(topic)
        return f"{self.name}/{topic}"

    def close(self) -> None:
        """See `UpdateLog.close`; nothing to let go of."""

    def delete_before(self, topic: str, partition: int, offset: int) -> None:
        """Drop the records before `offset`, as a broker's retention does."""
        with self._lock:
            low = self._low[topic][partition]
            del self._records[topic][partition][: max(0, offset - low)]
            self._low[topic][partition] = max(low, offset)

    def _check_reachable(self, topic: str | None = None) -> None:
        if not self.reachable:
            raise TransportError(f"update log {self.name} is unreachable: set its attribute `reachable`")
        if topic is not None and topic not in self._records:
            raise missing_topic(topic, self.name)


def __getattr__(name: str):
    if name == "KafkaLog":  # re-exported lazily: kafka_log needs this module
        from fednested_lib.kafka_log import KafkaLog

        return KafkaLog
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

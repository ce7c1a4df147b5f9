"""The trigger's side of the log: where reading goes on, and the topic of what can never be launched.

The position is the committed offset of a Kafka group that nobody joins: partitions are assigned, not balanced, so a
restarted trigger goes on at once instead of waiting for a dead member's session to end. It is a convenience, not the
truth: read from the beginning again, every task would meet its own execution.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fednested_lib.errors import ContractError, PayloadError, TransportError
from fednested_lib.events import SIGNATURE_HEADER
from fednested_lib.log import DEAD_TASKS, Record, UpdateLog

GROUP = "fednested-trigger"
REASON_HEADER = "fednested-reason"
DETAIL_HEADER = "fednested-detail"
MAX_DETAIL_BYTES = 1024  # a detail may name a field, and whoever wrote the record named the field
TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where reading goes on, and in which log: offsets alone say nothing once a broker was wiped.

    Args:
        offset: the next one.
        log_id: identity of the topic; empty if unknown.
        digest: of the record before `offset`; empty if unknown.
    """

    offset: int
    log_id: str = ""
    digest: str = ""


class Positions(Protocol):
    """Keeps the position per partition between two runs."""

    def load(self, topic: str, partitions: list[int]) -> dict[int, Position]:
        """Return partition → position, without those that were never saved.

        Raises:
            TransportError: the broker does not answer.
        """

    def save(self, topic: str, positions: Mapping[int, Position]) -> None:
        """Keep the positions.

        Raises:
            TransportError: the broker does not answer; what was read comes again.
        """

    def close(self) -> None:
        """Let go of connections."""


class InMemoryPositions:
    """`Positions` in this process, for tests."""

    def __init__(self):
        self.saved: dict[str, dict[int, Position]] = {}

    def load(self, topic: str, partitions: list[int]) -> dict[int, Position]:
        """See `Positions.load`."""
        return dict(self.saved.get(topic, {}))

    def save(self, topic: str, positions: Mapping[int, Position]) -> None:
        """See `Positions.save`."""
        self.saved.setdefault(topic, {}).update(positions)

    def close(self) -> None:
        """See `Positions.close`."""


def group_of(federation: str, project: str, domain: str) -> str:
    """Return the group of one trigger: those that share a broker must not settle each other's tasks.

    A dot is in no name of a federation, project or domain, so no two of them have one group.
    """
    return ".".join((GROUP, federation, project, domain))


class KafkaPositions:
    """`Positions` as the committed offsets of a group on the Kafka cluster at `bootstrap`.

    Digest and identity are the commit's metadata, `<digest> <log id>`.
    """

    def __init__(self, bootstrap: str, *, group: str):
        import confluent_kafka

        self._kafka = confluent_kafka
        self.bootstrap, self.group = bootstrap, group
        self._consumer = confluent_kafka.Consumer(
            {
                "bootstrap.servers": bootstrap,
                "client.id": "fednested-trigger",
                "group.id": group,
                "enable.auto.commit": False,
                "allow.auto.create.topics": False,
                "log_level": 0,
            }
        )

    def load(self, topic: str, partitions: list[int]) -> dict[int, Position]:
        """See `Positions.load`."""
        wanted = [self._kafka.TopicPartition(topic, partition) for partition in partitions]
        with self._errors("tell the offsets"):
            found = self._consumer.committed(wanted, timeout=TIMEOUT_S)
        return {place.partition: _position(place.offset, place.metadata) for place in found if place.offset >= 0}

    def save(self, topic: str, positions: Mapping[int, Position]) -> None:
        """See `Positions.save`."""
        places = [
            self._kafka.TopicPartition(topic, partition, to.offset, f"{to.digest} {to.log_id}")
            for partition, to in positions.items()
        ]
        with self._errors("commit the offsets"):
            for place in self._consumer.commit(offsets=places, asynchronous=False):
                if place.error is not None:
                    raise self._kafka.KafkaException(place.error)

    def close(self) -> None:
        """See `Positions.close`."""
        self._consumer.close()

    @contextlib.contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except self._kafka.KafkaException as error:
            raise TransportError(
                f"broker {self.bootstrap} did not {action} of group {self.group} within {TIMEOUT_S:g} s "
                f"({_text(error)}): start it, or set FEDNESTED_KAFKA_BOOTSTRAP to one that runs"
            ) from error


def _position(offset: int, metadata: str | None) -> Position:
    digest, _, log_id = (metadata or "").partition(" ")
    return Position(offset=offset, log_id=log_id, digest=digest)


def bury(log: UpdateLog, record: Record, why: ContractError) -> None:
    """Append a task that can never be launched to the dead-letter topic: its bytes, its place as key, the reason.

    Only place and reason where the log does not admit all of it. At least once: a crash may repeat it, readers dedupe
    by key.

    Raises:
        TransportError: the log does not answer; bury it again later.
    """
    reason = {REASON_HEADER: why.reason.encode(), DETAIL_HEADER: str(why).encode()[:MAX_DETAIL_BYTES]}
    signature = {name: value for name, value in record.headers if name == SIGNATURE_HEADER}
    key = place_of(record).encode()
    try:
        log.append(DEAD_TASKS, key=key, value=record.value, headers=signature | reason)
    except PayloadError:  # as large as the log admits, and a little more with the reason
        log.append(DEAD_TASKS, key=key, value=b"", headers=reason)


def place_of(record: Record) -> str:
    """Return `topic/partition/offset`."""
    return f"{record.topic}/{record.partition}/{record.offset}"


def _text(error: Any) -> str:
    return error.args[0].str() if error.args and hasattr(error.args[0], "str") else str(error)

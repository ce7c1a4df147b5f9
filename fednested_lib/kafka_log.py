"""The update log over a Kafka broker (confluent-kafka, imported when the log is opened).

Appends go through an idempotent producer with acks=all and return after the delivery report. Reads assign partitions
at explicit offsets; librdkafka insists on a group name, but nothing ever joins a group or commits. After any failed
append the producer is thrown away, because librdkafka calls an idempotent producer that met a broker with another
memory *fatal* and never uses it again; a record may then be in the log twice, which its update id shows.

`identity` is cluster id / topic id. Some small brokers tell neither (noida-db 0.2.3: a constant and zero); for these
`create_topics` adds an empty topic with a random name that stands for the log's identity.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeout  # the built-in one only from Python 3.11 on
from typing import Any

from fednested_lib.errors import ConfigError, LogError, PayloadError, TransportError
from fednested_lib.log import (
    MAX_RECORD_BYTES,
    Record,
    check_partitions,
    check_ranges,
    check_size,
    missing_topic,
    partition_of,
)

IDENTITY_PREFIX = "fednested.identity."
_NULL_TOPIC_ID = "A" * 22  # sixteen zero bytes in base64
_POLL_S = 0.01


class KafkaLog:
    """An `UpdateLog` on the Kafka cluster at `bootstrap`; safe for threads, not across fork.

    Args:
        bootstrap: comma-separated host:port.
        timeout_s: bound of every call: connecting, an acknowledgement, the next record of a read.

    Raises:
        ConfigError: `bootstrap` is empty or confluent-kafka is not installed.
    """

    def __init__(self, bootstrap: str, *, timeout_s: float = 20.0):
        if not bootstrap:
            raise ConfigError(
                "log.bootstrap must be host:port[,host:port…], got '': set it or FEDNESTED_KAFKA_BOOTSTRAP"
            )
        self._kafka = _import_kafka()
        self.bootstrap = bootstrap
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._clients: dict[str, Any] = {}
        self._partitions: dict[str, int] = {}
        self._last_error = ""

    def create_topics(self, topics: Mapping[str, int]) -> None:
        """See `UpdateLog.create_topics`."""
        existing = self._existing()
        check_partitions(topics, existing, self.bootstrap)
        missing = {topic: count for topic, count in topics.items() if topic not in existing}
        if not missing:
            return
        self._create(missing)
        has_marker = any(topic.startswith(IDENTITY_PREFIX) for topic in existing)
        if not has_marker and self._topic_id(next(iter(missing))) is None:
            self._create({IDENTITY_PREFIX + uuid.uuid4().hex: 1})

    def append(self, topic: str, *, key: bytes, value: bytes, headers: Mapping[str, bytes]) -> tuple[int, int]:
        """See `UpdateLog.append`."""
        check_size(topic, key, value, headers)
        partition = partition_of(key, self._partition_count(topic))
        reports: list[tuple[Any, int | None]] = []
        producer = self._client("producer")
        deadline = time.monotonic() + self.timeout_s + 2  # librdkafka expires messages once a second
        try:
            producer.produce(
                topic,
                value=value,
                key=key,
                headers=sorted(headers.items()),
                partition=partition,
                on_delivery=lambda error, message: reports.append((error, message.offset())),
            )
            while not reports and time.monotonic() < deadline:
                producer.poll(_POLL_S)
        except (self._kafka.KafkaException, BufferError) as error:
            self._discard(producer)
            raise self._unreachable(f"append to {topic}", error) from error
        error, offset = reports[0] if reports else (None, None)
        if error is not None and error.code() == self._kafka.KafkaError.MSG_SIZE_TOO_LARGE:
            raise PayloadError(
                "record_too_large",
                f"record of {len(value)} bytes exceeds max.message.bytes of {topic} on the log {self.bootstrap}: "
                f"allow {MAX_RECORD_BYTES} bytes",
            )
        if error is not None or offset is None or offset < 0:  # acknowledged as a duplicate: the offset is not told
            self._discard(producer)
            raise self._unreachable(f"append to {topic}", error)
        return partition, offset

    def read(self, topic: str, ranges: Mapping[int, tuple[int, int]]) -> Iterator[Record]:
        """See `UpdateLog.read`."""
        check_ranges(topic, ranges, self._offsets(topic), self.bootstrap)
        consumer = self._kafka.Consumer(self._config("consumer"))
        try:
            for partition, (start, end) in sorted(ranges.items()):
                if start < end:
                    consumer.assign([self._kafka.TopicPartition(topic, partition, start)])
                    yield from self._read_partition(consumer, topic, partition, start, end)
        finally:
            consumer.close()

    def watermarks(self, topic: str) -> dict[int, tuple[int, int]]:
        """See `UpdateLog.watermarks`."""
        watermarks = self._offsets(topic)
        if not watermarks:
            raise missing_topic(topic, self.bootstrap)
        return watermarks

    def identity(self, topic: str) -> str:
        """See `UpdateLog.identity`."""
        metadata = self._metadata()
        if topic not in metadata.topics:
            raise missing_topic(topic, self.bootstrap)
        markers = sorted(
            name.removeprefix(IDENTITY_PREFIX) for name in metadata.topics if name.startswith(IDENTITY_PREFIX)
        )
        topic_id = self._topic_id(topic) or "/".join([*markers[:1], topic])
        return f"{metadata.cluster_id or 'unknown'}/{topic_id}"

    def close(self) -> None:
        """See `UpdateLog.close`; every append was acknowledged or reported, so nothing is pending."""
        with self._lock:
            self._clients.clear()

    # librdkafka ---------------------------------------------------------------------------------------------------

    def _config(self, kind: str) -> dict[str, Any]:
        timeout_ms = int(self.timeout_s * 1000)
        config: dict[str, Any] = {
            "bootstrap.servers": self.bootstrap,
            "client.id": "fednested",
            "log_level": 0,  # a library does not print; the last error is in our exceptions
            "error_cb": self._note,
            "allow.auto.create.topics": False,  # an auto-created topic has the wrong number of partitions
            "socket.timeout.ms": max(1000, timeout_ms),
            "reconnect.backoff.max.ms": 2000,
            "receive.message.max.bytes": 2_147_483_647,  # noida answers a fetch with the whole backlog
        }
        if kind == "producer":
            config |= {"enable.idempotence": True, "acks": "all", "linger.ms": 0, "message.timeout.ms": timeout_ms}
            config["message.max.bytes"] = 1_048_576  # the brokers' default: MAX_RECORD_BYTES and its framing fit
        if kind == "consumer":
            config |= {
                "group.id": "fednested-explicit-offsets",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "isolation.level": "read_uncommitted",  # a skipped record would be a gap
            }
        return config

    def _client(self, kind: str) -> Any:
        with self._lock:
            if kind not in self._clients:
                make = self._kafka.Producer if kind == "producer" else self._kafka.admin.AdminClient
                self._clients[kind] = make(self._config(kind))
            return self._clients[kind]

    def _discard(self, producer: Any) -> None:
        """Forget `producer`; librdkafka drops what it still queues, so nothing is sent behind the caller's back."""
        with self._lock:
            if self._clients.get("producer") is producer:
                del self._clients["producer"]
            self._partitions.clear()

    def _note(self, error: Any) -> None:
        if error.code() != self._kafka.KafkaError._ALL_BROKERS_DOWN:  # the broker's own error before it says more
            self._last_error = error.str()

    def _unreachable(self, action: str, error: object) -> TransportError:
        for client in list(self._clients.values()):
            with contextlib.suppress(self._kafka.KafkaException):
                client.poll(0)  # delivers the connection's own error to `_note`
        reason = "; ".join(dict.fromkeys(text for text in (_reason(error), self._last_error) if text)) or "no answer"
        self._last_error = ""
        return TransportError(
            f"update log {self.bootstrap} did not {action} within {self.timeout_s:g} s ({reason}): "
            "start the broker, or set FEDNESTED_KAFKA_BOOTSTRAP or log.bootstrap to one that runs"
        )

    def _call(self, action: str, call: Any) -> Any:
        try:
            return call()
        except (self._kafka.KafkaException, FutureTimeout) as error:
            raise self._unreachable(action, error) from error

    def _metadata(self) -> Any:
        return self._call("answer", lambda: self._client("admin").list_topics(timeout=self.timeout_s))

    def _existing(self) -> dict[str, int]:
        """Return topic → number of partitions; asking for one topic by name would make some brokers create it."""
        return {name: len(topic.partitions) for name, topic in self._metadata().topics.items() if topic.error is None}

    def _partition_count(self, topic: str) -> int:
        if topic not in self._partitions:
            existing = self._existing()
            if topic not in existing:
                raise missing_topic(topic, self.bootstrap)
            self._partitions[topic] = existing[topic]
        return self._partitions[topic]

    def _create(self, topics: Mapping[str, int]) -> None:
        # Deletion by age only: compaction would remove single offsets, which `read` rightly calls a loss.
        new = [
            self._kafka.admin.NewTopic(name, count, -1, config={"cleanup.policy": "delete"})
            for name, count in topics.items()
        ]
        admin = self._client("admin")
        for topic, future in admin.create_topics(new, request_timeout=self.timeout_s).items():
            try:
                future.result(self.timeout_s + 2)
            except (self._kafka.KafkaException, FutureTimeout) as error:
                if _code(error) != self._kafka.KafkaError.TOPIC_ALREADY_EXISTS:
                    raise self._unreachable(f"create topic {topic}", error) from error
        deadline = time.monotonic() + self.timeout_s
        while not topics.keys() <= self._existing().keys():  # brokers learn of a new topic one after the other
            if time.monotonic() > deadline:
                raise self._unreachable(f"show new topics {sorted(topics)}", None)
            time.sleep(0.1)

    def _topic_id(self, topic: str) -> str | None:
        """Return the broker's id of `topic`, or None if it has none to give."""
        future = self._client("admin").describe_topics(
            self._kafka.TopicCollection([topic]), request_timeout=self.timeout_s
        )[topic]
        try:
            topic_id = str(future.result(self.timeout_s + 2).topic_id)
        except (self._kafka.KafkaException, FutureTimeout) as error:
            if _code(error) == self._kafka.KafkaError._UNSUPPORTED_FEATURE:
                return None
            raise self._unreachable(f"describe topic {topic}", error) from error
        return None if topic_id == _NULL_TOPIC_ID else topic_id

    def _offsets(self, topic: str) -> dict[int, tuple[int, int]]:
        """Return partition → (low, high), empty if there is no such topic."""
        partitions = [self._kafka.TopicPartition(topic, index) for index in range(self._existing().get(topic, 0))]
        low, high = (
            self._list_offsets(partitions, spec())
            for spec in (self._kafka.admin.OffsetSpec.earliest, self._kafka.admin.OffsetSpec.latest)
        )
        return {partition: (low[partition], high[partition]) for partition in low}

    def _list_offsets(self, partitions: list[Any], spec: Any) -> dict[int, int]:
        if not partitions:
            return {}
        admin = self._client("admin")
        futures = admin.list_offsets(dict.fromkeys(partitions, spec), request_timeout=self.timeout_s)
        results = {
            where.partition: self._call("list offsets", lambda f=future: f.result(self.timeout_s + 2))
            for where, future in futures.items()
        }
        return {partition: result.offset for partition, result in sorted(results.items())}

    def _read_partition(self, consumer: Any, topic: str, partition: int, start: int, end: int) -> Iterator[Record]:
        offset = start
        deadline = time.monotonic() + self.timeout_s
        while offset < end:
            message = consumer.poll(0.1)
            if message is None or message.error() is not None:
                self._check_progress(topic, partition, (offset, end), message, deadline)
                continue
            if message.offset() != offset:
                raise LogError(
                    f"{topic}[{partition}] of the log {self.bootstrap} gives {message.offset()} for offset {offset}: "
                    "records are missing (compacted or transactional topic?); restore them or connect the right log"
                )
            yield _record(message)
            offset += 1
            deadline = time.monotonic() + self.timeout_s  # the caller may have taken its time

    def _check_progress(self, topic: str, partition: int, rest: tuple[int, int], message: Any, deadline: float) -> None:
        """Raise when the rest of the range is lost or the broker has been silent for too long."""
        code = message.error().code() if message is not None else None
        if message is not None:
            self._note(message.error())
        if code != self._kafka.KafkaError._AUTO_OFFSET_RESET and time.monotonic() < deadline:
            return
        check_ranges(topic, {partition: rest}, self._offsets(topic), self.bootstrap)
        raise self._unreachable(f"give offset {rest[0]} of {topic}[{partition}]", None)


def _import_kafka() -> Any:
    try:
        import confluent_kafka
        import confluent_kafka.admin
    except ImportError as error:
        raise ConfigError(
            f"confluent-kafka cannot be imported ({error}): pip install 'confluent-kafka>=2.6'"
        ) from error
    return confluent_kafka


def _code(error: object) -> int | None:
    """Return librdkafka's code of a KafkaException, else None."""
    return error.args[0].code() if getattr(error, "args", None) and hasattr(error.args[0], "code") else None


def _reason(error: object) -> str:
    if error is None:
        return ""
    kafka_error = error.args[0] if _code(error) is not None else error
    return kafka_error.str() if hasattr(kafka_error, "str") else str(error) or type(error).__name__


def _record(message: Any) -> Record:
    headers = tuple(sorted((name, value or b"") for name, value in message.headers() or ()))
    return Record(
        topic=message.topic(),
        partition=message.partition(),
        offset=message.offset(),
        key=message.key() or b"",
        value=message.value() or b"",
        headers=headers,
    )

"""The contract of the update log: the in-memory twin, a real Kafka broker, and a gateway before it for devices."""

from __future__ import annotations

import itertools
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import pytest

from fednested_lib.errors import ConfigError, LogError, PayloadError, TransportError
from fednested_lib.gateway_log import GatewayLog
from fednested_lib.log import MAX_RECORD_BYTES, InMemoryLog, KafkaLog, Record, UpdateLog, records_digest
from tests.gateway import connect, make_gateway, serving


@dataclass
class Subject:
    log: UpdateLog | GatewayLog
    delete_before: Callable[[str, int, int], None]
    owner: UpdateLog  # creates topics

    def topic(self, partitions: int = 3) -> str:
        name = f"t.{uuid.uuid4().hex}"
        self.owner.create_topics({name: partitions})
        return name

    def fill(self, topic: str, count: int) -> list[tuple[int, int]]:
        """Append records v0, v1, … with keys k0 … k6."""
        return [
            self.log.append(topic, key=b"k%d" % (i % 7), value=b"v%d" % i, headers={"n": b"%d" % i})
            for i in range(count)
        ]


def _delete_records(bootstrap: str, topic: str, partition: int, offset: int) -> None:
    from confluent_kafka import TopicPartition
    from confluent_kafka.admin import AdminClient

    admin = AdminClient({"bootstrap.servers": bootstrap})
    for future in admin.delete_records([TopicPartition(topic, partition, offset)]).values():
        future.result(10)


@pytest.fixture(params=["memory", "kafka", "gateway"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "memory":
        log = InMemoryLog()
        yield Subject(log, log.delete_before, log)
        return
    if request.param == "gateway":
        log, directory = InMemoryLog(), request.getfixturevalue("tmp_path")
        with (
            serving(make_gateway(directory / "gateway", log).app()) as url,
            closing(GatewayLog(connect(url))) as device,
        ):
            yield Subject(device, log.delete_before, log)
        return
    bootstrap = request.getfixturevalue("kafka_bootstrap")
    log = KafkaLog(bootstrap, timeout_s=60)
    yield Subject(log, lambda topic, partition, offset: _delete_records(bootstrap, topic, partition, offset), log)
    log.close()


def test_a_key_always_goes_to_the_crc32_partition_with_consecutive_offsets(subject: Subject):
    """Order per device rests on this, and both implementations must agree for a replay to find the same records."""
    topic = subject.topic()
    expected = {0: itertools.count(), 1: itertools.count(), 2: itertools.count()}
    for i, place in enumerate(subject.fill(topic, 30)):
        partition = zlib.crc32(b"k%d" % (i % 7)) % 3
        assert place == (partition, next(expected[partition]))


def test_a_read_gives_exactly_the_half_open_ranges_in_order(subject: Subject):
    """A cut is these ranges; one record more or less would be another version."""
    topic = subject.topic()
    places = subject.fill(topic, 60)
    ends = {partition: high for partition, (_, high) in subject.log.watermarks(topic).items()}
    ranges = {partition: (2, end - 1) for partition, end in ends.items()}
    records = list(subject.log.read(topic, ranges))
    expected = [(p, offset) for p in sorted(ranges) for offset in range(*ranges[p])]
    assert [(record.partition, record.offset) for record in records] == expected
    assert all(record.value == b"v%d" % places.index((record.partition, record.offset)) for record in records)
    assert {record.topic for record in records} == {topic}


def test_reading_moves_nothing(subject: Subject):
    """The log keeps no position: the same ranges give the same records, also after more were appended."""
    topic = subject.topic()
    subject.fill(topic, 20)
    ranges = subject.log.watermarks(topic)
    before = list(subject.log.read(topic, ranges))
    subject.fill(topic, 20)
    assert list(subject.log.read(topic, ranges)) == before


def test_an_abandoned_read_does_no_harm(subject: Subject):
    """A caller that stops in the middle must not disturb the next read."""
    topic = subject.topic(1)
    subject.fill(topic, 50)
    reader = subject.log.read(topic, {0: (0, 50)})
    assert next(reader).offset == 0
    reader.close()
    assert len(list(subject.log.read(topic, {0: (0, 50)}))) == 50


@pytest.mark.parametrize("value", [b"", b"\x00\xff" * 500, "ü".encode()])
def test_bytes_come_back_as_they_went(subject: Subject, value: bytes):
    """Digests and signatures are over these bytes, the empty value of a claim check included."""
    topic = subject.topic(1)
    headers = {"z": b"\x00", "a": b"", "fednested-envelope": b'{"x":1}'}
    subject.log.append(topic, key=b"\xff", value=value, headers=headers)
    (record,) = subject.log.read(topic, {0: (0, 1)})
    expected = Record(
        topic=topic, partition=0, offset=0, key=b"\xff", value=value, headers=tuple(sorted(headers.items()))
    )
    assert record == expected
    assert record.digest == expected.digest


def test_a_lost_tail_is_a_named_stop(subject: Subject):
    """A log that ends before the cut does has lost records: never a shorter cut in silence."""
    topic = subject.topic(1)
    subject.fill(topic, 5)
    with pytest.raises(LogError, match=r"\[0, 6\).*ends at 5"):
        list(subject.log.read(topic, {0: (0, 6)}))
    with pytest.raises(LogError, match=r"\[6, 6\).*ends at 5"):
        list(subject.log.read(topic, {0: (6, 6)}))


def test_removed_records_are_a_named_stop(subject: Subject):
    """A range that begins before what is kept must not start later in silence; an empty one needs no record."""
    topic = subject.topic(1)
    subject.fill(topic, 10)
    subject.delete_before(topic, 0, 4)
    assert subject.log.watermarks(topic) == {0: (4, 10)}
    with pytest.raises(LogError, match=r"\[3, 10\).*begins at 4"):
        list(subject.log.read(topic, {0: (3, 10)}))
    assert list(subject.log.read(topic, {0: (2, 2)})) == []
    assert [record.offset for record in subject.log.read(topic, {0: (4, 10)})] == list(range(4, 10))
    assert subject.log.append(topic, key=b"k", value=b"", headers={}) == (0, 10)


@pytest.mark.parametrize(("partition", "start", "end"), [(1, 0, 1), (0, 2, 1), (0, -1, 1)])
def test_impossible_ranges_are_refused(subject: Subject, partition: int, start: int, end: int):
    """A manifest with a wrong partition or range must not read something else."""
    topic = subject.topic(1)
    subject.fill(topic, 3)
    with pytest.raises(LogError, match="manifest or state|no such partition"):
        list(subject.log.read(topic, {partition: (start, end)}))


def test_a_topic_that_is_not_there_is_said_and_not_created(subject: Subject):
    """An auto-created topic would have the wrong number of partitions and scatter a device's updates."""
    name = f"missing.{uuid.uuid4().hex}"
    for call in (
        lambda: subject.log.append(name, key=b"k", value=b"v", headers={}),
        lambda: subject.log.watermarks(name),
        lambda: subject.log.identity(name),
    ):
        with pytest.raises(TransportError, match="bootstrap-topics"):
            call()
    with pytest.raises(LogError, match="no such partition"):
        list(subject.log.read(name, {0: (0, 1)}))
    with pytest.raises(TransportError, match="does not exist"):
        subject.log.watermarks(name)


def test_creating_topics_twice_is_harmless_and_another_count_is_refused(subject: Subject):
    """Bootstrap is run again and again; a changed partition count would move keys. A device cannot create any."""
    topic = subject.topic(3)
    subject.fill(topic, 4)
    subject.owner.create_topics({topic: 3})
    assert sum(high for _, high in subject.log.watermarks(topic).values()) == 4
    with pytest.raises(ConfigError, match=r"must have 2 partition\(s\), got 3|created at tier 1"):
        subject.log.create_topics({topic: 2})


def test_a_record_beyond_the_bound_is_refused_before_it_is_sent(subject: Subject):
    """It could never be delivered, so it must not be retried for ever."""
    topic = subject.topic(1)
    with pytest.raises(PayloadError, match=str(MAX_RECORD_BYTES)) as refused:
        subject.log.append(topic, key=b"k", value=bytes(MAX_RECORD_BYTES), headers={})
    assert refused.value.reason == "record_too_large"
    assert subject.log.append(topic, key=b"", value=bytes(MAX_RECORD_BYTES - 3), headers={"h": b"xy"}) == (0, 0)


def test_identity_is_stable_and_tells_topics_apart(subject: Subject):
    """The manifest stores it; a cut of one topic must not be replayed from another."""
    one, two = subject.topic(), subject.topic()
    first = subject.log.identity(one)
    subject.fill(one, 3)
    assert subject.log.identity(one) == first
    assert subject.log.identity(two) != first


def test_concurrent_appends_are_all_there_once(subject: Subject):
    """Devices' records may be appended by several threads of one gateway."""
    topic = subject.topic()
    places: list[tuple[int, int]] = []
    names = [[b"%d.%d" % (thread, i) for i in range(25)] for thread in range(4)]

    def work(values: list[bytes]) -> None:
        for value in values:
            places.append(subject.log.append(topic, key=value, value=value, headers={}))

    threads = [threading.Thread(target=work, args=(values,)) for values in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = list(subject.log.read(topic, subject.log.watermarks(topic)))
    assert sorted(places) == [(record.partition, record.offset) for record in records]
    assert sorted(record.value for record in records) == sorted(itertools.chain(*names))


def test_both_logs_give_the_same_digest_of_the_same_records(subject: Subject):
    """A cut's digest must not depend on which implementation read it, nor on the order of reading."""
    topic = subject.topic()
    subject.fill(topic, 12)
    memory = InMemoryLog()
    twin = Subject(memory, memory.delete_before, memory)
    twin.log.create_topics({topic: 3})
    twin.fill(topic, 12)
    records = list(subject.log.read(topic, subject.log.watermarks(topic)))
    assert records == list(twin.log.read(topic, twin.log.watermarks(topic)))
    assert records_digest(reversed(records)) == records_digest(records)


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"kX"},
        {"value": b"vX"},
        {"headers": (("h", b"X"),)},
        {"headers": (("hh", b""),)},
        {"headers": ()},
        {"key": b"kv", "value": b""},
        {"key": b"k", "value": b"vh", "headers": (("", b""),)},
    ],
)
def test_the_digest_covers_every_byte_and_its_place(change: dict):
    """A changed key, value or header, or bytes moved from one to the other, must show."""
    record = Record(topic="t", partition=0, offset=0, key=b"k", value=b"v", headers=(("h", b""),))
    assert replace(record, **change).digest != record.digest


def test_the_digest_of_records_covers_topic_partition_and_offset():
    """The same record at another place is another cut; headers in another order are the same record."""
    record = Record(topic="t", partition=0, offset=0, key=b"k", value=b"v", headers=(("a", b"1"), ("b", b"2")))
    digest = records_digest([record])
    for change in ({"topic": "u"}, {"partition": 1}, {"offset": 1}):
        assert replace(record, **change).digest == record.digest
        assert records_digest([replace(record, **change)]) != digest
    assert replace(record, headers=record.headers[::-1]).digest == record.digest
    assert records_digest([record, record]) != digest


def test_an_unreachable_memory_log_answers_as_an_unreachable_broker():
    """Tests of retry use this switch instead of mocks."""
    log = InMemoryLog()
    log.create_topics({"t": 1})
    log.reachable = False
    with pytest.raises(TransportError, match="unreachable"):
        log.append("t", key=b"", value=b"", headers={})
    log.reachable = True
    assert log.append("t", key=b"", value=b"", headers={}) == (0, 0)

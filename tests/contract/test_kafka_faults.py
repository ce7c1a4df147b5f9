"""What KafkaLog does when the broker stops, restarts, or comes back with another memory."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from fednested_lib.errors import ConfigError, LogError, PayloadError, TransportError
from fednested_lib.log import KafkaLog
from services.embedded import EmbeddedBroker

TIMEOUT_S = 5.0  # of calls that must fail, each of which takes it
PATIENCE_S = 60.0  # of calls that must not


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(tmp_path / "broker") as broker:
        yield broker


@pytest.fixture
def log(broker: EmbeddedBroker) -> Iterator[KafkaLog]:
    log = KafkaLog(broker.bootstrap, timeout_s=PATIENCE_S)
    log.create_topics({"t": 1})
    yield log
    log.close()


def _append(log: KafkaLog, value: bytes) -> tuple[int, int]:
    return log.append("t", key=b"k", value=value, headers={})


def _impatient(log: KafkaLog) -> KafkaLog:
    """Let a log, none of whose clients was used to append, wait no longer than a call that must fail should."""
    log.timeout_s = TIMEOUT_S
    return log


def test_a_stopped_broker_is_an_error_in_time_and_not_a_hang(broker: EmbeddedBroker, log: KafkaLog):
    """Every call ends within its timeout and says which broker, how long, why and what to do."""
    log = _impatient(log)
    _append(log, b"0")
    broker.stop()
    for call in (
        lambda: _append(log, b"1"),
        lambda: log.watermarks("t"),
        lambda: list(log.read("t", {0: (0, 1)})),
        lambda: log.create_topics({"u": 1}),
    ):
        begin = time.monotonic()
        with pytest.raises(TransportError) as error:
            call()
        assert time.monotonic() - begin < TIMEOUT_S + 30
        for part in (broker.bootstrap, f"{TIMEOUT_S:g} s", "Connection refused", "FEDNESTED_KAFKA_BOOTSTRAP"):
            assert part in str(error.value)
        assert "\n" not in str(error.value)


def test_a_restart_on_the_same_data_loses_nothing(broker: EmbeddedBroker, log: KafkaLog):
    """A stop writes what was acknowledged a moment ago, and the same KafkaLog goes on afterwards."""
    identity = log.identity("t")
    assert [_append(log, b"%d" % i) for i in range(20)][-1] == (0, 19)
    broker.stop()
    broker.start()
    assert log.identity("t") == identity
    assert [record.value for record in log.read("t", {0: (0, 20)})] == [b"%d" % i for i in range(20)]
    assert _append(log, b"20") == (0, 20)


def test_a_failed_append_is_not_sent_later_behind_the_callers_back(broker: EmbeddedBroker, log: KafkaLog):
    """What was reported as failed must not appear when the broker is back: the caller decides about a second try."""
    log = _impatient(log)
    _append(log, b"0")
    broker.stop()
    with pytest.raises(TransportError):
        _append(log, b"lost")
    broker.start()
    log.timeout_s = PATIENCE_S
    assert _append(log, b"1") == (0, 1)
    time.sleep(1)
    assert [record.value for record in log.read("t", {0: (0, log.watermarks("t")[0][1])})] == [b"0", b"1"]


def test_a_wiped_broker_has_another_identity_and_its_offsets_are_refused(broker: EmbeddedBroker, log: KafkaLog):
    """Offsets that are used a second time must be seen, though this broker tells neither cluster nor topic id."""
    identity = log.identity("t")
    for i in range(3):
        _append(log, b"%d" % i)
    broker.stop()
    shutil.rmtree(broker.directory / "data")
    broker.start()
    with pytest.raises(LogError, match="no such partition"):
        list(log.read("t", {0: (0, 3)}))
    log.create_topics({"t": 1})
    assert log.identity("t") != identity
    with pytest.raises(LogError, match="ends at 0"):
        list(log.read("t", {0: (0, 3)}))


def test_a_producer_that_librdkafka_gave_up_is_replaced(broker: EmbeddedBroker, log: KafkaLog):
    """After a broker forgot the producer's sequence numbers librdkafka fails for ever; a new append must work."""
    for i in range(3):
        _append(log, b"%d" % i)
    broker.stop()
    shutil.rmtree(broker.directory / "data")
    broker.start()
    KafkaLog(broker.bootstrap, timeout_s=PATIENCE_S).create_topics({"t": 1})
    with pytest.raises(TransportError):
        _append(log, b"first")
    assert _append(log, b"second")[0] == 0


def test_a_gap_inside_a_range_is_a_named_stop(log: KafkaLog):
    """A transaction's commit marker takes an offset that holds no record: a range over it is not complete."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": log.bootstrap, "transactional.id": uuid.uuid4().hex})
    producer.init_transactions(60)
    producer.begin_transaction()
    producer.produce("t", b"0", partition=0)
    producer.commit_transaction(60)
    _append(log, b"after the marker")
    high = log.watermarks("t")[0][1]
    assert high == 3
    with pytest.raises(LogError, match="for offset 1"):
        list(log.read("t", {0: (0, high)}))


def test_a_topic_deleted_meanwhile_is_not_created_anew(log: KafkaLog):
    """The producer remembers topics; a broker that auto-creates would bring it back with one partition and offset 0."""
    from confluent_kafka.admin import AdminClient

    log = _impatient(log)
    _append(log, b"0")
    admin = AdminClient({"bootstrap.servers": log.bootstrap})
    admin.delete_topics(["t"])["t"].result(60)
    with pytest.raises(TransportError):
        _append(log, b"1")
    with pytest.raises(TransportError, match="does not exist"):
        _append(log, b"1")
    assert "t" not in admin.list_topics(timeout=60).topics


def test_a_record_that_this_topic_never_takes_is_not_retried(log: KafkaLog):
    """A broker may allow less than its default; that is a refusal of the record, not an outage."""
    from confluent_kafka.admin import AdminClient, NewTopic

    admin = AdminClient({"bootstrap.servers": log.bootstrap})
    admin.create_topics([NewTopic("small", 1, 1, config={"max.message.bytes": "1000"})])["small"].result(60)
    with pytest.raises(PayloadError, match=r"max\.message\.bytes of small") as refused:
        log.append("small", key=b"k", value=bytes(5000), headers={})
    assert refused.value.reason == "record_too_large"
    assert _append(log, b"0") == (0, 0)


def test_an_empty_address_is_refused_at_once():
    """librdkafka would accept it and wait for ever."""
    with pytest.raises(ConfigError, match=r"log\.bootstrap"):
        KafkaLog("")

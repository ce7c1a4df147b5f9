"""The outbox: whatever dies in between, an update reaches the log at least once, in order, and recognisably."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

from fednested_lib.blobs import BlobStore
from fednested_lib.envelope import HEADER, INLINE_LIMIT_BYTES
from fednested_lib.errors import ConfigError, ContractError, StorageError, TransportError
from fednested_lib.log import InMemoryLog, KafkaLog, Record
from fednested_lib.outbox import BACKOFF_CAP_S, RETRY_AFTER_CAP_S, DrainReport, Outbox, drain
from fednested_lib.outbox_survey import read_survey
from fednested_lib.signing import sha256_hex

TOPIC = "updates.experts.local"
SMALL, LARGE = b"s" * INLINE_LIMIT_BYTES, b"l" * (INLINE_LIMIT_BYTES + 1)


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log() -> InMemoryLog:
    log = InMemoryLog()
    log.create_topics({TOPIC: 3})
    return log


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "payloads")


@pytest.fixture
def outbox(tmp_path: Path):
    with Outbox(tmp_path / "outbox", max_bytes=1 << 20) as outbox:
        yield outbox


def put(outbox: Outbox, sequence: int, payload: bytes = SMALL) -> str:
    update_id = sha256_hex(b"%d" % sequence + payload)
    outbox.put(sequence, update_id, TOPIC, b"device-1", payload, update_id.encode())
    return update_id


def send(outbox: Outbox, log: InMemoryLog, store: BlobStore, clock: Clock, patience_s: float = 0) -> DrainReport:
    return drain(outbox, log, store, now=clock.now, rng=random.Random(0), sleep=clock.sleep, patience_s=patience_s)


def records(log: InMemoryLog | KafkaLog, topic: str = TOPIC) -> list[Record]:
    return list(log.read(topic, log.watermarks(topic)))


def payload_files(outbox: Outbox) -> list[str]:
    return sorted(path.name for path in (outbox.directory / "payloads").iterdir())


def test_small_payloads_travel_inline_and_large_ones_by_claim_check(outbox, log, store, clock):
    """The record of a large payload is a pointer whose blob exists; the envelope goes as it was stored."""
    ids = [put(outbox, 0, SMALL), put(outbox, 1, LARGE)]
    assert send(outbox, log, store, clock).sent == tuple(ids)
    small, large = records(log)
    assert (small.value, large.value) == (SMALL, b"")
    assert [record.headers for record in (small, large)] == [((HEADER, i.encode()),) for i in ids]
    assert list(store.digests()) == [sha256_hex(LARGE)]


def test_updates_leave_in_the_order_of_their_sequence(outbox, log, store, clock):
    """One device's updates stay in order, whatever order they were put in."""
    ids = {sequence: put(outbox, sequence) for sequence in (3, 1, 2)}
    assert send(outbox, log, store, clock).sent == (ids[1], ids[2], ids[3])
    assert outbox.last_sequence() == 3


def test_putting_the_same_update_again_sends_it_once(outbox, log, store, clock):
    """A restarted device repeats its last steps: before sending, after it and after the receipt nothing changes."""
    for _ in range(2):
        update_id = put(outbox, 7)
    send(outbox, log, store, clock)
    put(outbox, 7)
    assert send(outbox, log, store, clock).sent == ()
    outbox.confirm([update_id])
    put(outbox, 7)
    assert send(outbox, log, store, clock).sent == ()
    assert len(records(log)) == 1
    assert payload_files(outbox) == []


def test_a_sequence_number_with_other_bytes_is_refused(outbox):
    """Equivocation would send the device's update to quarantine: it is caught before it leaves."""
    put(outbox, 7)
    with pytest.raises(ContractError, match="sequence 7") as refused:
        put(outbox, 7, LARGE)
    assert refused.value.reason == "equivocation"


def test_a_payload_is_kept_until_a_receipt_names_it(outbox, log, store, clock):
    """An acknowledged record may still be lost by the broker; only the manifest's word lets the payload go."""
    first, second = put(outbox, 0), put(outbox, 1)
    send(outbox, log, store, clock)
    assert [item.update_id for item in outbox.unconfirmed()] == [first, second]
    outbox.confirm([first, "unknown"])
    assert payload_files(outbox) == [f"{second}.bin"]
    outbox.send_again([first, second])
    assert send(outbox, log, store, clock).sent == (second,)
    assert [record.headers[0][1].decode() for record in records(log)] == [first, second, second]


def test_an_unreachable_log_costs_waiting_and_nothing_else(outbox, log, store, clock):
    """Failures are recorded with growing, jittered, bounded delays, in order, and end when the log is back."""
    ids = [put(outbox, sequence) for sequence in range(3)]
    log.reachable = False
    report = send(outbox, log, store, clock, patience_s=3600)
    assert report.sent == ()
    assert report.left == 3
    assert "unreachable" in report.error
    head, *others = outbox.pending()
    assert head.attempts > 3600 / BACKOFF_CAP_S
    assert all(item.attempts == 0 for item in others)
    assert clock.now() < head.not_before_s <= clock.now() + BACKOFF_CAP_S
    log.reachable = True
    assert send(outbox, log, store, clock).sent == (), "the back-off still holds"
    assert send(outbox, log, store, clock, patience_s=BACKOFF_CAP_S).sent == tuple(ids)


def test_the_back_off_has_full_jitter_and_doubles_to_its_cap(outbox):
    """Devices that lost the same broker must not come back together."""
    update_id = put(outbox, 0)
    delays = []
    for attempt in range(12):
        delays.append(outbox.mark_failed(update_id, "down", now=0.0, rng=random.Random(attempt)))
        assert 0 <= delays[-1] <= min(BACKOFF_CAP_S, 0.5 * 2**attempt)
    draws = [random.Random(attempt).uniform(0, min(60.0, 0.5 * 2**attempt)) for attempt in range(12)]
    assert delays == draws  # uniform(0, min(cap, base · 2^attempt)) of the generator that was handed in


def test_the_back_off_survives_a_restart_and_a_clock_set_back(tmp_path, log, store, clock):
    """A restart loop must not hammer the broker; a clock that jumps to the past must not stall the device."""
    with Outbox(tmp_path / "o", max_bytes=1 << 20) as outbox:
        update_id = put(outbox, 0)
        due_s = outbox.mark_failed(update_id, "down", now=clock.now(), rng=random.Random(1))
    with Outbox(tmp_path / "o", max_bytes=1 << 20) as outbox:
        (item,) = outbox.pending()
        assert (item.not_before_s, item.attempts, item.last_error) == (due_s, 1, "down")
        assert send(outbox, log, store, clock).sent == ()
        clock.now_s = -1e6
        assert send(outbox, log, store, clock).sent == (update_id,)


def test_the_servers_wish_to_wait_wins_and_outlives_a_restart(tmp_path, log, store, clock, monkeypatch):
    """A server that is overloaded says for how long: longer than our longest back-off, shorter, not at all."""

    def refuse(*_arguments, **_named):
        raise TransportError("too many requests", retry_after_s=wishes.pop())

    with monkeypatch.context() as patched, Outbox(tmp_path / "o", max_bytes=1 << 20) as outbox:
        update_id = put(outbox, 0)
        patched.setattr(log, "append", refuse)
        wishes = [900.0, 1e9, 0.0]
        send(outbox, log, store, clock)
        assert 0 < outbox.pending()[0].wait_s(clock.now()) < 1
        clock.now_s += 1
        send(outbox, log, store, clock)
        assert outbox.pending()[0].wait_s(clock.now()) == RETRY_AFTER_CAP_S
        clock.now_s += RETRY_AFTER_CAP_S
        send(outbox, log, store, clock)
    with Outbox(tmp_path / "o", max_bytes=1 << 20) as outbox:
        clock.now_s += 899
        assert send(outbox, log, store, clock).sent == ()
        clock.now_s += 1
        assert send(outbox, log, store, clock).sent == (update_id,)


def test_an_outbox_of_an_older_release_is_taken_over(tmp_path, log, store, clock):
    """A device that is updated keeps what waits in its outbox."""
    with Outbox(tmp_path / "o", max_bytes=1 << 20) as outbox:
        update_id = put(outbox, 0)
        outbox._execute("ALTER TABLE updates DROP COLUMN failed_at_s")
    with Outbox(tmp_path / "o", max_bytes=1 << 20) as outbox:
        assert send(outbox, log, store, clock).sent == (update_id,)


def test_a_listing_needs_no_lock_and_changes_nothing(outbox, log, store, clock):
    """A person may look while the device works: what waits and why, what is refused for good, what is not settled."""
    good, bad = put(outbox, 0), put(outbox, 1)
    (outbox.directory / "payloads" / f"{bad}.bin").write_bytes(b"other")
    send(outbox, log, store, clock)
    waiting = put(outbox, 2)
    outbox.mark_failed(waiting, "down", now=clock.now(), rng=random.Random(1), retry_after_s=30)
    survey = read_survey(outbox.directory)
    assert [(row.sequence, row.state) for row in survey.rows] == [(0, "sent"), (1, "dead"), (2, "ready")]
    assert survey.rows[1].last_error.startswith("corrupt_payload")
    text = survey.describe(now=clock.now() + 10)
    assert "1 waiting, 1 sent and not settled, 1 dead" in text
    assert f"2  {waiting[:12]}  waiting" in text
    assert "next attempt in 20 s: down" in text
    assert good[:12] not in text
    with pytest.raises(ConfigError, match="no outbox"):
        read_survey(outbox.directory / "nowhere")


def test_a_damaged_payload_is_set_aside_and_the_rest_goes_on(outbox, log, store, clock):
    """One bad file must not block the device, and must not be sent either."""
    bad, gone, good = put(outbox, 0), put(outbox, 1), put(outbox, 2)
    (outbox.directory / "payloads" / f"{bad}.bin").write_bytes(b"other")
    (outbox.directory / "payloads" / f"{gone}.bin").unlink()
    report = send(outbox, log, store, clock)
    assert (report.dead, report.sent, report.left) == ((bad, gone), (good,), 0)
    assert [item.last_error.split(":")[0] for item in outbox.dead()] == ["corrupt_payload", "missing_payload"]


def test_a_full_outbox_says_how_full_and_what_to_do(tmp_path):
    """The bound counts what is kept, sent updates included, and frees with receipts."""
    with Outbox(tmp_path / "o", max_bytes=2 * len(SMALL)) as outbox:
        first = put(outbox, 0)
        put(outbox, 1)
        outbox.mark_sent(first, 0, 0)
        with pytest.raises(
            StorageError, match=rf"holds {2 * len(SMALL)} of {2 * len(SMALL)} bytes.*outgoing\.outbox_bytes"
        ):
            put(outbox, 2)
        outbox.confirm([first])
        put(outbox, 2)


def test_a_full_disk_is_one_line_and_loses_nothing(outbox, log, store, clock, monkeypatch):
    """ENOSPC while the payload or the row is written: what was put before is still sent."""
    first = put(outbox, 0)

    def no_space(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("fednested_lib.blobs.os.fsync", no_space)
        with pytest.raises(StorageError, match=r"disk full.*free space"):
            put(outbox, 1)
    pages = outbox._database.execute("PRAGMA page_count").fetchone()[0]
    outbox._database.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageError, match=r"outbox\.db refuses.*full.*free disk space"):
        outbox.put(2, "2" * 64, TOPIC, b"k", b"p", bytes(100_000))
    outbox._database.execute("PRAGMA max_page_count=100000")
    assert send(outbox, log, store, clock).sent == (first,)


def test_files_that_no_row_needs_are_swept_at_the_start(tmp_path):
    """A crash between file and row, or between confirmation and removal, must not fill the disk for ever."""
    with Outbox(tmp_path / "o", max_bytes=1 << 20) as outbox:
        update_id = put(outbox, 0)
    for name in ("f" * 64 + ".bin", f".{update_id}.bin.abc.tmp"):
        (tmp_path / "o" / "payloads" / name).write_bytes(b"orphan")
    with Outbox(tmp_path / "o", max_bytes=1 << 20) as outbox:
        assert payload_files(outbox) == [f"{update_id}.bin"]


def test_one_process_owns_an_outbox(outbox, tmp_path):
    """Two senders on one directory would sweep each other's files and break the order."""
    with pytest.raises(StorageError, match="in use by another process"):
        Outbox(tmp_path / "outbox", max_bytes=1)


def test_a_file_that_is_no_database_is_named(tmp_path):
    """A damaged database must not look like an empty outbox."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "outbox.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(StorageError, match=r"outbox\.db refuses"):
        Outbox(tmp_path / "o", max_bytes=1)


def test_rows_are_durable_when_put_returns(outbox):
    """WAL alone may lose the last commits in a power cut; synchronous=FULL (2) does not."""
    assert outbox._database.execute("PRAGMA synchronous").fetchone() == (2,)
    assert outbox._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


DEVICE = textwrap.dedent(
    """
    import random, sys, time
    from fednested_lib.blobs import BlobStore
    from fednested_lib.log import KafkaLog
    from fednested_lib.outbox import Outbox, drain
    from fednested_lib.signing import sha256_hex

    directory, bootstrap, topic = sys.argv[1:]
    payloads = [b"0" * 100, b"1" * 40_000, b"2" * 50_000, b"3" * 100]
    outbox = Outbox(directory + "/outbox", max_bytes=1 << 20)
    log, store = KafkaLog(bootstrap, timeout_s=60), BlobStore(directory + "/payloads")
    for sequence, payload in enumerate(payloads):
        update_id = sha256_hex(payload)
        outbox.put(sequence, update_id, topic, b"device", payload, update_id.encode())
        report = drain(outbox, log, store, now=time.time, rng=random.Random(), sleep=time.sleep)
        assert report.left == 0, report
        outbox.confirm([item.update_id for item in outbox.unconfirmed()][:-1])
    """
)


def _device(directory: Path, bootstrap: str, topic: str, failpoint: str) -> int:
    environment = {**os.environ, "FEDNESTED_FAILPOINT": failpoint}
    command = [sys.executable, "-c", DEVICE, str(directory), bootstrap, topic]
    return subprocess.run(command, env=environment, check=False, timeout=300).returncode


@pytest.mark.parametrize(
    "failpoint",
    [
        "durable.before_rename:2",
        "outbox.after_file:2",
        "outbox.after_row:2",
        "outbox.after_blob:1",
        "outbox.after_append:2",
        "outbox.after_mark:2",
        "outbox.after_confirm:2",
    ],
)
def test_a_kill_at_every_step_loses_nothing_and_repeats_only_recognisably(
    tmp_path: Path, kafka_bootstrap: str, failpoint: str
):
    """SIGKILL between any two durable steps, then a restart: each update is in the log, in order, with its bytes."""
    topic = f"t.{uuid.uuid4().hex}"
    log = KafkaLog(kafka_bootstrap, timeout_s=60)
    log.create_topics({topic: 1})
    assert _device(tmp_path, kafka_bootstrap, topic, failpoint) == -signal.SIGKILL
    assert _device(tmp_path, kafka_bootstrap, topic, "") == 0

    payloads = [b"0" * 100, b"1" * 40_000, b"2" * 50_000, b"3" * 100]
    expected = [(sha256_hex(payload), payload if len(payload) < 1000 else b"") for payload in payloads]
    found = [(record.headers[0][1].decode(), record.value) for record in records(log, topic)]
    assert list(dict.fromkeys(found)) == expected
    assert len(found) == 4 + (failpoint == "outbox.after_append:2")
    assert set(BlobStore(tmp_path / "payloads").digests()) == {expected[1][0], expected[2][0]}
    with Outbox(tmp_path / "outbox", max_bytes=1 << 20) as outbox:
        assert outbox.pending() == []
        assert payload_files(outbox) == [f"{item.update_id}.bin" for item in outbox.unconfirmed()]

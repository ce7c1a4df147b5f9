"""The device's durable outbox: an update that was put here reaches the log at least once, whatever dies in between.

    put:   payload file (tmp, fsync, rename, fsync of the directory)  →  row (SQLite, WAL, synchronous=FULL)
    drain: blob (claim check, only above 16 KiB)  →  record appended and acknowledged  →  row marked sent
    confirm: row marked confirmed  →  payload file removed

Each arrow is a failpoint. A crash before the row leaves an orphan file, swept at the next start; one between
append and mark sends the record twice with the same update id, which the aggregator's dedupe shows. A sent payload
stays until a manifest or receipt names it. Only the oldest row is ever in flight, so one device's updates stay in
order; its back-off has full jitter (Brooker, *Exponential Backoff and Jitter*, 2015) and lives in the row, so a restart
loop cannot hammer a broker that is down. A server that says how long to wait is obeyed instead, up to an hour. The row
also says when it was written: a clock that shows less than that was set back, and nothing waits for it. Order is that
of sequence numbers, never of any clock.
"""

from __future__ import annotations

import fcntl
import os
import random
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from fednested_lib.blobs import write_durable
from fednested_lib.envelope import HEADER, INLINE_LIMIT_BYTES
from fednested_lib.errors import ContractError, OutboxFull, PayloadError, StorageError, TransportError
from fednested_lib.failpoints import failpoint
from fednested_lib.signing import sha256_hex
from fednested_lib.transport import DeviceLog, PayloadStore

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 60.0
RETRY_AFTER_LEAST_S, RETRY_AFTER_CAP_S = 0.1, 3600.0  # a server that says "at once" for ever must not be hammered

_SCHEMA = """
CREATE TABLE IF NOT EXISTS updates(
  sequence INTEGER PRIMARY KEY,
  update_id TEXT NOT NULL UNIQUE,
  topic TEXT NOT NULL,
  key BLOB NOT NULL,
  envelope BLOB NOT NULL,
  payload_sha256 TEXT NOT NULL,
  payload_bytes INTEGER NOT NULL,
  state TEXT NOT NULL DEFAULT 'ready' CHECK(state IN ('ready', 'sent', 'dead', 'confirmed')),
  attempts INTEGER NOT NULL DEFAULT 0,
  not_before_s REAL NOT NULL DEFAULT 0,
  failed_at_s REAL NOT NULL DEFAULT 0,
  last_error TEXT,
  log_partition INTEGER,
  log_offset INTEGER
)
"""
_COLUMNS = (
    "sequence, update_id, topic, key, envelope, payload_sha256, payload_bytes, attempts, not_before_s, failed_at_s,"
    " last_error"
)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class OutboxItem:
    """One update in the outbox.

    It failed last at `failed_at_s` and is not tried again before `not_before_s`, both seconds since the epoch.
    """

    sequence: int
    update_id: str
    topic: str
    key: bytes
    envelope: bytes
    payload_sha256: str
    payload_bytes: int
    attempts: int
    not_before_s: float
    failed_at_s: float
    last_error: str | None

    def wait_s(self, now: float) -> float:
        """Return how long to wait before the next attempt; 0 if the clock was set back since the last one."""
        return max(0.0, self.not_before_s - now) if now >= self.failed_at_s else 0.0


@dataclass(frozen=True, kw_only=True)
class DrainReport:
    """What one call of `drain` did; `error` is the transport's last complaint while `left` updates wait."""

    sent: tuple[str, ...]
    dead: tuple[str, ...]
    left: int
    error: str | None


class Outbox:
    """Updates of one device, in the order of their sequence numbers, in a directory that one process owns at a time.

    Args:
        directory: created when missing.
        max_bytes: bound of all payloads that are kept (waiting, refused for good, or sent and not yet confirmed).

    Raises:
        StorageError: another process holds the outbox, or the file system refuses.
    """

    def __init__(self, directory: str | os.PathLike, *, max_bytes: int):
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        self._payloads = self.directory / "payloads"
        try:
            self._payloads.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.directory / "lock", "wb")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise StorageError(
                f"outbox {self.directory} cannot be opened ({error.strerror}): fix the path or its permissions"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StorageError(
                f"outbox {self.directory} is in use by another process: stop it, or give this device another directory"
            ) from error
        self._database: sqlite3.Connection | None = None
        self._execute("PRAGMA journal_mode=WAL")
        self._execute("PRAGMA synchronous=FULL")
        self._execute(_SCHEMA)
        if "failed_at_s" not in {row[1] for row in self._execute("PRAGMA table_info(updates)")}:  # of an older release
            self._execute("ALTER TABLE updates ADD COLUMN failed_at_s REAL NOT NULL DEFAULT 0")
        self._sweep()

    def put(self, sequence: int, update_id: str, topic: str, key: bytes, payload: bytes, envelope: bytes) -> None:
        """Keep an update durably; putting the same one again does nothing, also after it was sent or confirmed.

        Raises:
            ContractError: reason ``equivocation``: the sequence number belongs to another update.
            StorageError: the outbox or the disk is full.
        """
        known = self._execute("SELECT update_id FROM updates WHERE sequence = ?", (sequence,)).fetchone()
        if known is not None and known[0] != update_id:
            raise ContractError(
                "equivocation",
                f"sequence {sequence} of outbox {self.directory} is update {known[0][:12]}, got {update_id[:12]}: "
                "take the next sequence number",
            )
        if known is not None:
            return
        self._check_room(len(payload))
        write_durable(self._path(update_id), payload)
        failpoint("outbox.after_file")
        self._execute(
            "INSERT INTO updates(sequence, update_id, topic, key, envelope, payload_sha256, payload_bytes)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (sequence, update_id, topic, key, envelope, sha256_hex(payload), len(payload)),
        )
        failpoint("outbox.after_row")

    def pending(self) -> list[OutboxItem]:
        """Return what was not sent yet, oldest first."""
        return self._items("ready")

    def unconfirmed(self) -> list[OutboxItem]:
        """Return what was sent and is named by no manifest or receipt yet, oldest first."""
        return self._items("sent")

    def dead(self) -> list[OutboxItem]:
        """Return what can never be sent, with the reason in `last_error`; `confirm` removes it."""
        return self._items("dead")

    def last_sequence(self) -> int | None:
        """Return the highest sequence number ever put, or None."""
        return self._execute("SELECT max(sequence) FROM updates").fetchone()[0]

    def payload(self, item: OutboxItem) -> bytes:
        """Read the payload of `item`.

        Raises:
            PayloadError: reason ``missing_payload`` or ``corrupt_payload``.
        """
        path = self._path(item.update_id)
        try:
            payload = path.read_bytes()
        except OSError as error:
            raise PayloadError(
                "missing_payload", f"payload {path} cannot be read ({error.strerror}): train the update again"
            ) from error
        if sha256_hex(payload) != item.payload_sha256:
            raise PayloadError(
                "corrupt_payload",
                f"payload {path} must have the digest {item.payload_sha256}, but was altered: train the update again",
            )
        return payload

    def mark_sent(self, update_id: str, partition: int, offset: int) -> None:
        """Record where the log acknowledged the update."""
        self._execute(
            "UPDATE updates SET state = 'sent', log_partition = ?, log_offset = ?, last_error = NULL"
            " WHERE update_id = ? AND state = 'ready'",
            (partition, offset, update_id),
        )

    def mark_dead(self, update_id: str, reason: str) -> None:
        """Give an update up: it can never be sent. Its row and payload stay as evidence."""
        self._execute(
            "UPDATE updates SET state = 'dead', last_error = ? WHERE update_id = ? AND state = 'ready'",
            (reason, update_id),
        )

    def mark_failed(
        self, update_id: str, error: str, *, now: float, rng: random.Random, retry_after_s: float | None = None
    ) -> float:
        """Record a failed attempt and return the time before which the next one must not be made.

        Args:
            update_id: of the update.
            error: what to tell a person.
            now: seconds since the epoch.
            rng: draws the back-off.
            retry_after_s: the server's wish, which wins.
        """
        (attempts,) = self._execute("SELECT attempts FROM updates WHERE update_id = ?", (update_id,)).fetchone()
        wait_s = rng.uniform(0, min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** min(attempts, 16)))
        if retry_after_s is not None:
            wait_s = min(max(retry_after_s, RETRY_AFTER_LEAST_S), RETRY_AFTER_CAP_S)
        self._execute(
            "UPDATE updates SET attempts = attempts + 1, not_before_s = ?, failed_at_s = ?, last_error = ?"
            " WHERE update_id = ?",
            (now + wait_s, now, error, update_id),
        )
        return now + wait_s

    def send_again(self, update_ids: Iterable[str]) -> None:
        """Queue sent updates once more, e.g. because no manifest named them for long; the aggregator dedupes."""
        self._change(
            update_ids,
            "UPDATE updates SET state = 'ready', attempts = 0, not_before_s = 0 WHERE update_id = ? AND state = 'sent'",
        )

    def confirm(self, update_ids: Iterable[str]) -> None:
        """Let go of the payloads of updates that a manifest or receipt names; unknown ids are ignored.

        The row stays without its envelope, so that the same update is never sent by a later `put`.
        """
        changed = self._change(
            update_ids,
            "UPDATE updates SET state = 'confirmed', envelope = x'' WHERE update_id = ? AND state != 'confirmed'",
        )
        failpoint("outbox.after_confirm")
        if changed:  # most of what tier 1 names are other devices' updates; what a crash left is swept at the start
            self._sweep()

    def close(self) -> None:
        """Let go of the directory."""
        if self._database is not None:
            self._database.close()
        self._lock.close()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _path(self, update_id: str) -> Path:
        return self._payloads / f"{update_id}.bin"

    def _items(self, state: str) -> list[OutboxItem]:
        cursor = self._execute(f"SELECT {_COLUMNS} FROM updates WHERE state = ? ORDER BY sequence", (state,))
        names = [column[0] for column in cursor.description]
        return [OutboxItem(**dict(zip(names, row, strict=True))) for row in cursor]

    def _change(self, update_ids: Iterable[str], statement: str) -> int:
        self._execute("BEGIN IMMEDIATE")
        try:
            changed = sum(self._execute(statement, (update_id,)).rowcount for update_id in update_ids)
        except BaseException:
            self._execute("ROLLBACK")
            raise
        self._execute("COMMIT")
        return changed

    def _check_room(self, payload_bytes: int) -> None:
        (used,) = self._execute(
            "SELECT coalesce(sum(payload_bytes), 0) FROM updates WHERE state != 'confirmed'"
        ).fetchone()
        if used + payload_bytes > self.max_bytes:
            raise OutboxFull(
                f"outbox {self.directory} holds {used} of {self.max_bytes} bytes and cannot take {payload_bytes} more: "
                "let it send and wait for receipts, or raise outgoing.outbox_bytes"
            )

    def _sweep(self) -> None:
        """Remove files that no row needs: left by a crash between file and row, or between confirmation and removal."""
        needed = {
            self._path(row[0]).name for row in self._execute("SELECT update_id FROM updates WHERE state != 'confirmed'")
        }
        for path in self._payloads.iterdir():
            if path.name not in needed:
                path.unlink(missing_ok=True)

    def _execute(self, statement: str, values: tuple = ()) -> sqlite3.Cursor:
        try:
            if self._database is None:
                self._database = sqlite3.connect(self.directory / "outbox.db", isolation_level=None)
            return self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise StorageError(
                f"outbox database {self.directory / 'outbox.db'} refuses ({error}): "
                "free disk space, fix its permissions or restore the file; nothing that was put is lost"
            ) from error


def drain(
    outbox: Outbox,
    log: DeviceLog,
    payload_store: PayloadStore,
    *,
    now: Callable[[], float],
    rng: random.Random,
    sleep: Callable[[float], None],
    patience_s: float = 0.0,
) -> DrainReport:
    """Send what is pending, oldest first, and stop at the first update that has to wait.

    Args:
        outbox: what to send.
        log: where records go.
        payload_store: where payloads above 16 KiB go, before their record.
        now: returns seconds since the epoch.
        rng: draws the jitter of the back-off.
        sleep: waits that many seconds.
        patience_s: how long to wait, in all, for back-offs before control is given back; 0: not at all.

    Raises:
        StorageError: the outbox's or the payload store's disk is full; nothing is lost.
    """
    sent: list[str] = []
    dead: list[str] = []
    error: str | None = None
    give_up_at = now() + patience_s
    while items := outbox.pending():
        item = items[0]
        wait_s = item.wait_s(now())
        if wait_s > 0:
            error = item.last_error
            if now() + wait_s > give_up_at:
                break
            sleep(wait_s)
            if item not in outbox.pending():  # settled meanwhile: whoever sleeps also follows the control topic
                continue
        try:
            _send(item, outbox, log, payload_store)
            sent.append(item.update_id)
        except TransportError as problem:
            outbox.mark_failed(item.update_id, str(problem), now=now(), rng=rng, retry_after_s=problem.retry_after_s)
            _log.warning("outbox.send_failed", update_id=item.update_id, attempts=item.attempts + 1)
        except PayloadError as problem:
            outbox.mark_dead(item.update_id, f"{problem.reason}: {problem}")
            dead.append(item.update_id)
            _log.error("outbox.dead", update_id=item.update_id, reason=problem.reason)
    left = len(outbox.pending())
    return DrainReport(sent=tuple(sent), dead=tuple(dead), left=left, error=error if left else None)


def _send(item: OutboxItem, outbox: Outbox, log: DeviceLog, payload_store: PayloadStore) -> None:
    value = outbox.payload(item)
    if len(value) > INLINE_LIMIT_BYTES:
        payload_store.put(value)
        failpoint("outbox.after_blob")
        value = b""
    partition, offset = log.append(item.topic, key=item.key, value=value, headers={HEADER: item.envelope})
    failpoint("outbox.after_append")
    outbox.mark_sent(item.update_id, partition, offset)
    failpoint("outbox.after_mark")
    _log.info(
        "outbox.sent", update_id=item.update_id, partition=partition, offset=offset, payload_bytes=item.payload_bytes
    )

"""Where each update went, so that a device whose answer was lost gets the same answer again, and no second record.

A place counts only while the log still has that very record there: a log that lost it gets it anew. A crash between
the broker's acknowledgement and the row costs a second record with the same update id, which admission refuses as a
duplicate.
"""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

from fednested_lib.errors import LogError, StorageError
from fednested_lib.failpoints import failpoint
from fednested_lib.log import Record, UpdateLog

_SCHEMA = """
CREATE TABLE IF NOT EXISTS places(
  update_id TEXT PRIMARY KEY, identity TEXT NOT NULL, topic TEXT NOT NULL,
  partition INTEGER NOT NULL, position INTEGER NOT NULL
) WITHOUT ROWID
"""


class Places:
    """The place of each update, in a SQLite file.

    Args:
        path: of the file.
        log: where updates go.
    """

    def __init__(self, path: Path, log: UpdateLog):
        self._path, self._log, self._lock = path, log, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{path} cannot be opened ({error}): fix its permissions") from error
        self._execute("PRAGMA journal_mode=WAL")
        self._execute(_SCHEMA)

    def append(self, record: Record, update_id: str | None) -> tuple[int, int]:
        """Append a record once and return its place; one call about one update at a time.

        Raises:
            TransportError: the log does not answer; ask again.
        """
        if update_id is None:
            return self._append(record)
        known = self._find(record, update_id)
        if known is not None:
            return known
        place = self._append(record)
        failpoint("gateway.after_append")
        self._execute(
            "INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?)",
            (update_id, self._log.identity(record.topic), record.topic, *place),
        )
        return place

    def prune(self, topic: str) -> None:
        """Forget the places that the log does not have any more."""
        identity = self._log.identity(topic)
        self._execute("DELETE FROM places WHERE topic = ? AND identity != ?", (topic, identity))
        for partition, (low, _) in self._log.watermarks(topic).items():
            self._execute(
                "DELETE FROM places WHERE topic = ? AND partition = ? AND position < ?", (topic, partition, low)
            )

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _append(self, record: Record) -> tuple[int, int]:
        return self._log.append(record.topic, key=record.key, value=record.value, headers=dict(record.headers))

    def _find(self, record: Record, update_id: str) -> tuple[int, int] | None:
        rows = self._execute(
            "SELECT partition, position FROM places WHERE update_id = ? AND identity = ? AND topic = ?",
            (update_id, self._log.identity(record.topic), record.topic),
        )
        if not rows:
            return None
        ((partition, offset),) = rows
        try:
            (there,) = self._log.read(record.topic, {partition: (offset, offset + 1)})
        except LogError:
            return None
        return (partition, offset) if there.digest == record.digest else None

    def _execute(self, statement: str, values: tuple = ()) -> list[tuple]:
        try:
            with self._lock:
                return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"{self._path} refuses ({error}): free disk space or restore the file") from error

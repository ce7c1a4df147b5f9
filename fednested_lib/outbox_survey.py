"""What lies in an outbox, for a person: read beside the process that owns it, without its lock.

States as they are named to people: waiting (not sent yet, with the last complaint), sent and not settled (the log has
it, no manifest names it yet, so its payload is kept), dead (refused for good, with the reason; payload kept as
evidence).
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fednested_lib.errors import ConfigError, StorageError

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One update that the outbox still keeps; times in seconds since the epoch."""

    sequence: int
    update_id: str
    state: str
    payload_bytes: int
    attempts: int
    not_before_s: float
    last_error: str | None


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Everything that an outbox keeps, in the order of the numbers."""

    rows: tuple[Row, ...]

    def describe(self, *, now: float) -> str:
        """Return a page: totals, then the oldest that wait and all that are dead."""
        states = Counter(row.state for row in self.rows)
        size_bytes = sum(row.payload_bytes for row in self.rows)
        total = f"{states['ready']} waiting, {states['sent']} sent and not settled, {states['dead']} dead"
        waiting = [row for row in self.rows if row.state == "ready"]
        dead = [row for row in self.rows if row.state == "dead"]
        lines = [_line(row, now) for row in (*waiting[:_SHOWN], *dead[-_SHOWN:])]
        more = len(waiting) + len(dead) - len(lines)
        return "\n".join([f"{total}; {size_bytes} bytes", *lines, *([f"and {more} more"] if more else [])])


def _line(row: Row, now: float) -> str:
    name = f"{row.sequence}  {row.update_id[:12]}"
    error = row.last_error or "not tried yet"
    if row.state == "dead":
        return f"{name}  dead: {error}"
    return (
        f"{name}  waiting, {row.attempts} attempts, next attempt in {max(0.0, row.not_before_s - now):.0f} s: {error}"
    )


def read_survey(directory: Path) -> Survey:
    """Read the outbox in `directory`.

    Raises:
        ConfigError: there is none.
        StorageError: its database cannot be read.
    """
    path = Path(directory) / "outbox.db"
    if not path.exists():
        raise ConfigError(f"there is no outbox at {directory}: check --config, or start the device first")
    names = tuple(Row.__dataclass_fields__)
    try:
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            rows = database.execute(
                f"SELECT {', '.join(names)} FROM updates WHERE state != 'confirmed' ORDER BY sequence"
            ).fetchall()
        finally:
            database.close()
    except sqlite3.Error as error:
        raise StorageError(f"outbox database {path} refuses ({error}): fix its permissions or restore it") from error
    return Survey(rows=tuple(Row(**dict(zip(names, row, strict=True))) for row in rows))

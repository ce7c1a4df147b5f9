"""The sidecar's memory of what it let out: budgets of bytes, updates and ε, and the newest policy it obeyed.

    day      Σ bytes and number of releases within the last 86 400 s           (sliding: exact for any 24 hours)
    ε        z = (Σ_i 1/z_i²)^(−½) over all releases ever, ε = ε(z, δ)           (Gaussian mechanisms compose so)

A release is one row, written before anything else happens to it (SQLite, WAL, synchronous=FULL) and keyed by its
number and its bytes' digest: doing it again after a crash costs nothing twice, while what a new policy makes of the
same update, and the same bytes under another number, cost anew. Rows are never removed. Time is an argument; rows from
the future, which a clock set back leaves, are dated to now: they count for a whole day again.
"""

from __future__ import annotations

import math
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from fednested_lib.errors import ConfigError, PolicyRefused, PolicyWait, StorageError
from fednested_lib.policy import Policy
from fednested_lib.privacy import epsilon

DAY_S = 86_400.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS policy(
  one INTEGER PRIMARY KEY CHECK(one = 1), version INTEGER NOT NULL, digest TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS expert_sets(
  policy_version INTEGER PRIMARY KEY, digest TEXT NOT NULL, since_s REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS releases(
  sequence INTEGER NOT NULL,
  payload_sha256 TEXT NOT NULL,
  payload_bytes INTEGER NOT NULL,
  inverse_z2 REAL NOT NULL,
  policy_version INTEGER NOT NULL,
  released_s REAL NOT NULL,
  PRIMARY KEY(sequence, payload_sha256)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_time ON releases(released_s);
"""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What one update costs: bytes, and 1/z² of its noise (0 without DP)."""

    sequence: int
    payload_sha256: str
    payload_bytes: int
    inverse_z2: float


class Ledger:
    """Budgets of one device.

    Args:
        path: of the database; created when missing.

    Raises:
        StorageError: the file system refuses.
    """

    def __init__(self, path: Path):
        self.path = path
        self._database: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(f"ledger {path} cannot be opened ({error.strerror}): fix the path") from error
        self._execute("PRAGMA journal_mode=WAL")
        self._execute("PRAGMA synchronous=FULL")
        for statement in _SCHEMA.split(";"):
            self._execute(statement)

    def obey(self, policy: Policy) -> bool:
        """Remember a policy and say whether it is a new one.

        Raises:
            ConfigError: a newer one was obeyed before, or another one of the same version.
        """
        known = self._execute("SELECT version, digest FROM policy").fetchone()
        version, digest = known or (0, "")
        if policy.version < version or (policy.version == version and policy.digest != digest):
            how = "older than" if policy.version < version else "not the same as"
            raise ConfigError(
                f"policy version {policy.version} is {how} the version {version} that this device obeyed: raise its "
                f"`version` above {version} and sign it anew"
            )
        if policy.version == version:
            return False
        self._execute("INSERT OR REPLACE INTO policy VALUES (1, ?, ?)", (policy.version, policy.digest))
        return True

    def fix_experts(self, policy: Policy, digest: str, *, now: float) -> None:
        """Hold the set of adapted experts to that of a policy's first update: every change would tell routing.

        With `experts_period_days` it may change once in so many days.

        Raises:
            PolicyRefused: reason ``experts_changed``: it may not change under this policy.
            PolicyWait: the same reason: not yet.
        """
        version, days = policy.version, policy.experts_period_days
        self._execute("UPDATE expert_sets SET since_s = ? WHERE since_s > ?", (now, now))
        self._execute("INSERT OR IGNORE INTO expert_sets VALUES (?, ?, ?)", (version, digest, now))
        held = "SELECT digest, since_s FROM expert_sets WHERE policy_version = ?"
        fixed, since_s = self._execute(held, (version,)).fetchone()
        if fixed == digest:
            return
        if days is None:
            raise PolicyRefused(
                "experts_changed",
                f"the adapted experts differ from those of the first update under policy {version}: which "
                "experts change with the data must not be seen; sign a policy with a higher version to change them",
            )
        until = since_s + days * DAY_S
        if now < until:
            raise PolicyWait(
                "experts_changed",
                f"other experts wait {until - now:.0f} s, experts_period_days = {days} of policy {version}: "
                "set adapters.period_days to no less",
                not_before_s=until,
            )
        self._execute("INSERT OR REPLACE INTO expert_sets VALUES (?, ?, ?)", (version, digest, now))

    def charge(self, charge: Charge, policy: Policy, *, now: float) -> float:
        """Book a release, unless a budget is spent; the same one again is booked already.

        Args:
            charge: what it costs.
            policy: its bounds.
            now: seconds since the epoch.

        Returns:
            ε spent by all releases, this one included; 0 without DP.

        Raises:
            PolicyWait: reason ``min_interval``, ``updates_per_day``, ``bytes_per_day`` or ``epsilon_total``.
        """
        self._execute("UPDATE releases SET released_s = ? WHERE released_s > ?", (now, now))
        name = (charge.sequence, charge.payload_sha256)
        known = self._execute("SELECT 1 FROM releases WHERE (sequence, payload_sha256) = (?, ?)", name).fetchone()
        spent = 0.0 if policy.dp == "off" else self._epsilon(charge, policy.dp.delta)
        if known is not None:
            return spent
        self._check_rate(charge, policy, now)
        if policy.dp != "off" and spent > policy.dp.epsilon_total:
            raise PolicyWait(
                "epsilon_total",
                f"update {charge.sequence} would bring ε to {spent:.3f} of {policy.dp.epsilon_total:g} (policy "
                f"{policy.version}): nothing leaves until a policy with a larger budget is signed",
                not_before_s=None,
            )
        self._execute(
            "INSERT INTO releases VALUES (?, ?, ?, ?, ?, ?)",
            (*name, charge.payload_bytes, charge.inverse_z2, policy.version, now),
        )
        return spent

    def close(self) -> None:
        """Let go of the database."""
        if self._database is not None:
            self._database.close()

    def _epsilon(self, charge: Charge, delta: float) -> float:
        (before,) = self._execute(
            "SELECT coalesce(sum(inverse_z2), 0) FROM releases WHERE (sequence, payload_sha256) != (?, ?)",
            (charge.sequence, charge.payload_sha256),
        ).fetchone()
        total = before + charge.inverse_z2
        return epsilon(1 / math.sqrt(total), 1, delta)

    def _check_rate(self, charge: Charge, policy: Policy, now: float) -> None:
        (last,) = self._execute("SELECT max(released_s) FROM releases").fetchone()
        count, size = self._execute(
            "SELECT count(*), coalesce(sum(payload_bytes), 0) FROM releases WHERE released_s > ?", (now - DAY_S,)
        ).fetchone()
        waits = {}
        if last is not None and last + policy.min_interval_s > now:
            waits["min_interval"] = last + policy.min_interval_s
        if count >= policy.updates_per_day:
            waits["updates_per_day"] = self._newest(policy.updates_per_day - 1) + DAY_S
        if size + charge.payload_bytes > policy.bytes_per_day:
            waits["bytes_per_day"] = self._first_over(policy.bytes_per_day - charge.payload_bytes) + DAY_S
        if waits:
            rule, until = max(waits.items(), key=lambda item: item[1])
            raise PolicyWait(
                rule,
                f"update {charge.sequence} waits {until - now:.0f} s: {rule} = {_bound(policy, rule):g} of policy "
                f"{policy.version} is reached; it is kept",
                not_before_s=until,
            )

    def _newest(self, skipped: int) -> float:
        """Return the time of a release, counted from the newest."""
        order = "SELECT released_s FROM releases ORDER BY released_s DESC LIMIT 1 OFFSET ?"
        return self._execute(order, (skipped,)).fetchone()[0]

    def _first_over(self, room: int) -> float:
        """Return the time of the newest release that does not fit into so many bytes with all newer ones."""
        for when, size in self._execute("SELECT released_s, payload_bytes FROM releases ORDER BY released_s DESC"):
            room -= size
            if room < 0:
                return when
        raise AssertionError("all of them fit")

    def _execute(self, statement: str, values: tuple = ()) -> sqlite3.Cursor:
        try:
            if self._database is None:
                self._database = sqlite3.connect(self.path, isolation_level=None)
            return self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise StorageError(
                f"ledger {self.path} refuses ({error}): free disk space, fix its permissions or restore the file; "
                "nothing leaves without it"
            ) from error


def _bound(policy: Policy, rule: str) -> float:
    return {
        "min_interval": policy.min_interval_s,
        "updates_per_day": policy.updates_per_day,
        "bytes_per_day": policy.bytes_per_day,
    }[rule]

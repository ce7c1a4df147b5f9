"""The device's own record of what it let out and what it held back: append-only, local, never sent anywhere.

    Y_j = HMAC(A_j, Y_{j−1} ‖ record_j),     A_{j+1} = SHA-256("fednested.audit.next/" ‖ A_j),     A_j is forgotten

(Schneier and Kelsey, *Secure Audit Logs to Support Computer Forensics*, ACM TISSEC 2(2), 1999, without its key
escrow.) Whoever takes the device at record n has A_n and cannot forge what was written before. Verification starts from
A_0, which lies with the anchor (number of records, last Y) in a directory apart from the log, made to be carried away:
an edit, a deletion and a changed order break the chain, a shortened log falls short of the anchor.

    append    line of the log (fsync)  →  key forward (tmp, fsync, rename)  →  anchor (likewise)

Each arrow is a failpoint. A crash before the first leaves a torn line, which is removed; one between any two leaves a
log that is one record ahead, which is made good at the next start. A log that is shorter than its key or its anchor is
never the mark of a crash. A record is time, decision, rule, sequence number, digest, counts, norm, bytes, ε and the
policy's version: never a value, a name or text.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fednested_lib.blobs import create_exclusive, write_durable
from fednested_lib.envelope import Digest
from fednested_lib.errors import AuditError, StorageError
from fednested_lib.failpoints import failpoint
from fednested_lib.signing import canonical_json

_START = "0" * 64
_log = structlog.get_logger(__name__)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Decision(_Strict):
    """One decision; what does not apply is null."""

    decision: Literal["policy", "released", "refused", "waiting"]
    time_s: float = Field(ge=0)
    policy_version: int = Field(ge=0)
    rule: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")] | None = None
    sequence: int | None = Field(default=None, ge=0)
    payload_sha256: Digest | None = None
    payload_bytes: int | None = Field(default=None, ge=0)
    experts: int | None = Field(default=None, ge=0)
    withheld: int | None = Field(default=None, ge=0)
    norm: float | None = Field(default=None, ge=0)
    epsilon: float | None = Field(default=None, ge=0)

    def same(self, other: Decision | None) -> bool:
        """Tell whether both are the same but for the time."""
        return other is not None and self.model_copy(update={"time_s": other.time_s}) == other


class _Line(Decision):
    n: int = Field(ge=0)
    mac: Digest


class _Key(_Strict):
    """What the writer knows: the key of record `count`, and where the log ended before it."""

    count: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    key: Digest
    mac: Digest


class Anchor(_Strict):
    """Number of records and the mac of the last: enough to notice that a log was shortened."""

    count: int = Field(ge=0)
    mac: Digest


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """A log that holds: its anchor now, and the marks of a crash: one record ahead of the anchor kept, a torn line."""

    anchor: Anchor
    ahead: bool
    torn: bool

    def __str__(self) -> str:
        crash = " (as a crash leaves it; the next start mends it)" if self.ahead or self.torn else ""
        return (
            f"audit log holds: {self.anchor.count} records{crash}; note this anchor elsewhere: "
            f"{self.anchor.count}:{self.anchor.mac}"
        )


def _next(key: bytes) -> bytes:
    return hashlib.sha256(b"fednested.audit.next/" + key).digest()


def _mac(key: bytes, previous: str, body: bytes) -> str:
    return hmac.new(key, previous.encode() + body, hashlib.sha256).hexdigest()


def _write_line(n: int, decision: Decision, key: bytes, previous: str) -> tuple[bytes, str]:
    body = {"n": n, **decision.model_dump(mode="json", exclude_none=True)}
    mac = _mac(key, previous, canonical_json(body))
    return canonical_json({**body, "mac": mac}) + b"\n", mac


def _read_line(raw: bytes, n: int, key: bytes, previous: str) -> _Line | str:
    """Return the record, or what is wrong with it."""
    try:
        line = _Line.model_validate_json(raw)
    except ValidationError:
        return "was edited (it is not a record)"
    if line.n != n:
        return f"is missing or moved (number {line.n} stands in its place)"
    decision = Decision(**line.model_dump(exclude={"n", "mac"}))
    written, _ = _write_line(n, decision, key, previous)
    return line if written == raw + b"\n" else "was edited"


class AuditLog:
    """The log of one device, which one process at a time appends to.

    Args:
        directory: holds `log.jsonl` and `key.json`; created when missing.
        anchor: directory of `first.key` and `anchor.json`; created when missing.

    Raises:
        AuditError: the log is not what its key says: shortened, edited at its end, or without its key.
        StorageError: the file system refuses.
    """

    def __init__(self, directory: Path, *, anchor: Path):
        self.path, self._key_path = directory / "log.jsonl", directory / "key.json"
        self._anchor_path = anchor / "anchor.json"
        try:
            for place in (directory, anchor):
                place.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._key_path.exists():
                self._begin(anchor / "first.key")
            self._key = _Key.model_validate_json(self._key_path.read_bytes())
            self._last = self._recover()
        except OSError as error:
            raise StorageError(
                f"audit log {self.path} cannot be opened ({error.strerror}): fix the path or its permissions; nothing "
                "leaves without a record"
            ) from error
        except ValidationError:
            raise AuditError(f"audit key {self._key_path} was edited: {_REMEDY}") from None

    @property
    def anchor(self) -> Anchor:
        """Number of records and the last mac."""
        return Anchor(count=self._key.count, mac=self._key.mac)

    def append(self, decision: Decision) -> None:
        """Write a decision durably; the same one again, as after a crash, is written once.

        Raises:
            StorageError: the disk refuses; then nothing may leave.
        """
        if decision.same(self._last):
            return
        line, mac = _write_line(self._key.count, decision, bytes.fromhex(self._key.key), self._key.mac)
        try:
            with open(self.path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"audit log {self.path} cannot be written ({error.strerror}): free space or fix its permissions; "
                "nothing leaves without a record"
            ) from error
        failpoint("audit.after_line")
        self._step(decision, len(line), mac)

    def _step(self, decision: Decision, size_bytes: int, mac: str) -> None:
        key = _Key(
            count=self._key.count + 1,
            size_bytes=self._key.size_bytes + size_bytes,
            key=_next(bytes.fromhex(self._key.key)).hex(),
            mac=mac,
        )
        write_durable(self._key_path, canonical_json(key.model_dump()))
        self._key, self._last = key, decision
        failpoint("audit.after_key")
        self._keep_anchor()

    def _keep_anchor(self) -> None:
        write_durable(self._anchor_path, canonical_json(self.anchor.model_dump()))

    def _begin(self, first: Path) -> None:
        """Make A_0; a log or an anchor without the writer's key is not a new device but a robbed one."""
        if self.path.exists() or self._anchor_path.exists():
            raise AuditError(
                f"audit log {self.path} or its anchor exists, but its key {self._key_path} is gone: {_REMEDY}"
            )
        if not first.exists():
            create_exclusive(first, secrets.token_hex(32).encode() + b"\n")
        key = _Key(count=0, size_bytes=0, key=_first_key(first).hex(), mac=_START)
        write_durable(self._key_path, canonical_json(key.model_dump()))

    def _recover(self) -> Decision | None:
        """Return the last decision; finish what a crash left between line, key and anchor."""
        data = self._tail()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(self.path, self._key.size_bytes + end)  # torn: never acknowledged
        lines = data[:end].splitlines()
        if len(lines) > 1:
            raise AuditError(f"audit log {self.path} has {len(lines)} records more than its key knows: {_REMEDY}")
        if lines:
            line = _read_line(lines[0], self._key.count, bytes.fromhex(self._key.key), self._key.mac)
            if isinstance(line, str):
                raise AuditError(f"audit log {self.path}: record {self._key.count} {line}: {_REMEDY}")
            decision = Decision(**line.model_dump(exclude={"n", "mac"}))
            self._step(decision, end, line.mac)
            _log.warning("audit.recovered", count=self._key.count)
            return decision
        self._check_anchor()
        return self._read_last()

    def _check_anchor(self) -> None:
        kept, count = _load_anchor(self._anchor_path), self._key.count
        if kept is None and count > 1 or kept is not None and kept.count not in (count - 1, count):
            found = "no anchor" if kept is None else f"{kept.count} in its anchor"
            raise AuditError(f"audit log {self.path} has {count} records, {found}: one of them was replaced; {_REMEDY}")
        if kept is not None and kept.count == count and kept != self.anchor:
            raise AuditError(f"audit anchor {self._anchor_path} was edited: {_REMEDY}")
        if kept != self.anchor:
            self._keep_anchor()

    def _tail(self) -> bytes:
        """Return what lies behind the end that the key knows."""
        if self._key.size_bytes == 0 and not self.path.exists():
            return b""
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < self._key.size_bytes:
                raise AuditError(
                    f"audit log {self.path} was shortened to {size} of {self._key.size_bytes} bytes: {_REMEDY}"
                )
            file.seek(self._key.size_bytes)
            return file.read()

    def _read_last(self) -> Decision | None:
        if self._key.count == 0:
            return None
        with open(self.path, "rb") as file:
            file.seek(max(0, self._key.size_bytes - 4096))
            raw = file.read().splitlines()[-1]
        try:
            line = _Line.model_validate_json(raw)
        except ValidationError:
            line = None
        if line is None or line.mac != self._key.mac:
            raise AuditError(f"audit log {self.path}: its last record was edited: {_REMEDY}")
        return Decision(**line.model_dump(exclude={"n", "mac"}))


_REMEDY = "see what `fednested tier2 audit verify` says, and move the log away to begin another"


def parse_anchor(text: str) -> Anchor:
    """Parse COUNT:MAC.

    Raises:
        AuditError: it is something else.
    """
    count, _, mac = text.partition(":")
    try:
        return Anchor(count=int(count), mac=mac)
    except ValueError:
        raise AuditError(f"anchor must be COUNT:MAC as `audit verify` prints it, got {text[:80]!r}") from None


def verify_audit(
    directory: Path, *, anchor: Path, first_key: Path | None = None, noted: Anchor | None = None
) -> AuditReport:
    """Check every record of a log, and its length against the writer's key and the anchor.

    Args:
        directory: of the log.
        anchor: directory of the anchor.
        first_key: A_0, wherever it was carried; default: beside the anchor.
        noted: an anchor that was noted down earlier, which the log must contain.

    Raises:
        AuditError: which record is wrong and how, or by how much the log is short.
    """
    log, kept, writer = directory / "log.jsonl", _load_anchor(anchor / "anchor.json"), _load_key(directory / "key.json")
    if kept is None:
        raise AuditError(f"audit anchor in {anchor} is missing: restore it; without one a shortened log looks whole")
    lines, torn = _lines(log)
    macs = _check_chain(log, lines, _first_key(first_key or anchor / "first.key"))
    count = len(lines)
    for name, each in (("writer's key", writer), ("anchor", kept), ("noted anchor", noted)):
        if each is not None and each.count > count:
            raise AuditError(f"audit log {log} has {count} records, its {name} {each.count}: the end was cut off")
        if each is not None and macs[each.count] != each.mac:
            raise AuditError(f"audit log {log}: its {name} of {each.count} records is another log's, or was edited")
    if count - kept.count > 1:
        raise AuditError(
            f"audit log {log} has {count} records, its anchor {kept.count}: a crash leaves one more, not "
            f"{count - kept.count}; the anchor was replaced by an older one"
        )
    return AuditReport(anchor=Anchor(count=count, mac=macs[count]), ahead=count > kept.count, torn=torn)


def _check_chain(log: Path, lines: list[bytes], key: bytes) -> list[str]:
    """Return the mac after 0, 1, 2, … records."""
    macs = [_START]
    for n, raw in enumerate(lines):
        line = _read_line(raw, n, key, macs[-1])
        if isinstance(line, str):
            raise AuditError(f"audit log {log}: record {n} {line}")
        key = _next(key)
        macs.append(line.mac)
    return macs


def _lines(log: Path) -> tuple[list[bytes], bool]:
    """Return the whole lines, and whether a torn one follows."""
    try:
        data = log.read_bytes()
    except FileNotFoundError:
        return [], False
    except OSError as error:
        raise AuditError(f"audit log {log} cannot be read ({error.strerror}): fix its permissions") from error
    *lines, rest = data.split(b"\n")
    return lines, bool(rest)


def _first_key(path: Path) -> bytes:
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise AuditError(
            f"first audit key {path} cannot be read ({error}): restore it, or name it with --key"
        ) from None
    if len(key) != 32:
        raise AuditError(f"first audit key {path} must be 64 hex digits: restore it")
    return key


def _load_key(path: Path) -> Anchor:
    try:
        key = _Key.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise AuditError(f"audit key {path} is missing, unreadable or was edited: restore it") from None
    return Anchor(count=key.count, mac=key.mac)


def _load_anchor(path: Path) -> Anchor | None:
    try:
        return Anchor.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise AuditError(f"audit anchor {path} was edited or cannot be read: restore it") from None

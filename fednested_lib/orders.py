"""How the two processes of a device talk: two small files, each written by one side and only read by the other.

    orders/orders.json   sidecar → trainer   the model to train on, which numbers are taken, whether to pause or end
    spool/status.json    trainer → sidecar   which orders it has read, its job, a snapshot that it found damaged

Both are replaced as a whole, so that a reader sees one or the other. Each side parses what the other wrote as strictly
as if it came from the network. Status names orders by their digest: the sidecar knows by it that the trainer has seen
the newest ones, and waits for that before it deletes a snapshot or ends.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fednested_lib.blobs import write_durable
from fednested_lib.envelope import Digest
from fednested_lib.errors import StorageError
from fednested_lib.signing import canonical_json, sha256_hex

MAX_SEQUENCE = 1 << 53
MAX_BYTES = 64 << 10
KEPT = 3  # snapshots that a device holds at most: the newest, the one before it, the one of the job

Sequence = Annotated[int, Field(ge=0, le=MAX_SEQUENCE)]


class _Note(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def to_bytes(self) -> bytes:
        """Return the canonical bytes."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes."""
        return sha256_hex(self.to_bytes())


class Model(_Note):
    """A snapshot that this device holds completely; `snapshot` is the digest of its manifest blob."""

    version: int = Field(ge=0)
    snapshot: Digest
    base_digest: Digest
    chain_seq: int = Field(ge=0)


class Refusal(_Note):
    """A spooled update that will not leave: a name for this refusal, the number, and a machine-readable reason."""

    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    sequence: Sequence
    reason: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")


class Orders(_Note):
    """What the sidecar tells the trainer.

    Args:
        model: to train on; None before the first.
        kept: snapshots whose blobs are all here.
        next_sequence: every smaller number is taken, and its spool file may be removed.
        pause: why no new update is wanted now.
        end: the federation is over; `completed` lets the update that was begun be finished.
        refused: the update that was refused last.
        repairs: how often blobs were verified and fetched anew because the trainer found them damaged.
        start_secret: what the starts of updates are derived from; of this device's key, and nobody else can compute it.
    """

    format: Literal["fednested.orders/1"] = "fednested.orders/1"
    model: Model | None = None
    kept: Annotated[list[Digest], Field(max_length=KEPT)] = []
    next_sequence: Sequence = 0
    pause: Literal["backlog", "policy"] | None = None
    end: Literal["completed", "cancelled"] | None = None
    refused: Refusal | None = None
    repairs: int = Field(default=0, ge=0)
    start_secret: Digest | None = None


class Status(_Note):
    """What the trainer tells the sidecar.

    Args:
        orders: digest of the orders that it has read last.
        job: number of the update it is making.
        snapshot: what that update is made from.
        damaged: the snapshot that it could not load.
        unloadable: the snapshot that it could not load after its blobs were verified and fetched anew.
        loaded: the snapshot that it loaded last and found fit: it builds, and its loss is finite.
    """

    format: Literal["fednested.status/1"] = "fednested.status/1"
    orders: Digest
    job: Sequence | None = None
    snapshot: Digest | None = None
    damaged: Digest | None = None
    unloadable: Digest | None = None
    loaded: Digest | None = None


_Kind = TypeVar("_Kind", bound=_Note)


def orders_path(home: Path) -> Path:
    """Return where the orders of a device lie."""
    return home / "orders" / "orders.json"


def status_path(home: Path) -> Path:
    """Return where the trainer's status lies."""
    return home / "spool" / "status.json"


def write_note(path: Path, note: _Note) -> None:
    """Replace a note durably.

    Raises:
        StorageError: the disk is full or the path cannot be written.
    """
    write_durable(path, note.to_bytes())


def read_note(path: Path, kind: type[_Kind]) -> _Kind | None:
    """Read what the other side wrote; None if there is nothing.

    Raises:
        StorageError: it cannot be read, or is not what this version writes.
    """
    try:
        return kind.model_validate_json(read_foreign(path, MAX_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not what this version writes"
        raise StorageError(f"{path} is unusable ({problem}): remove it and start both processes again") from None


def read_foreign(path: Path, max_bytes: int) -> bytes:
    """Read a file in a directory that somebody else writes: a regular file of bounded size, no link, no pipe.

    Raises:
        OSError: it is none, or larger.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes")
    return data

"""Append-only JSONL with fsync: the durable form of the audit log and of the lineage outbox.

A line counts once it ends with a newline and the file is synced. A process that dies, or a disk that fills up, in the
middle of a line leaves a torn tail; nobody was told that it exists, so the next append cuts it off and readers do not
see it. A damaged line before the tail is not a crash but an alteration, and stops the reader. Writers of several
processes take turns through an advisory lock on the file itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fednested_lib.blobs import fsync_path
from fednested_lib.errors import GovernanceError, StorageError
from fednested_lib.failpoints import failpoint
from fednested_lib.signing import canonical_json

TAIL_BLOCK_BYTES = 4096


class Journal:
    """One JSONL file.

    Args:
        path: the file; it and its directory are made on the first append.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records as one write and return when they are on disk.

        Raises:
            StorageError: the disk is full or the file cannot be written; nothing was added.
        """
        self.append_new(lambda _: records)

    def append_new(self, choose: Callable[[Iterator[dict[str, Any]]], Sequence[Mapping[str, Any]]]) -> None:
        """Add the records that `choose` picks in view of those already there, with no other writer in between.

        Raises:
            StorageError: the disk is full or the file cannot be written; nothing was added.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            created = not self.path.exists()
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                _cut_torn_tail(file.fileno())
                records = choose(self.read())
                if records:
                    _write_all(file.fileno(), b"".join(canonical_json(record) + b"\n" for record in records))
            if created:
                fsync_path(self.path.parent)
        except OSError as error:
            raise _refused(self.path, error) from error

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the records in order; a torn tail is not a record.

        Raises:
            GovernanceError: a line is not a JSON object, so the file was altered.
            StorageError: the file cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.endswith(b"\n"):
                        yield self._parse(number, line)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read ({error.strerror}): fix its permissions") from error

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise GovernanceError(f"{self.path} line {number} is not a JSON object: the file was altered, restore it")
        return record


def _cut_torn_tail(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    keep = size
    while keep:
        start = max(0, keep - TAIL_BLOCK_BYTES)
        newline = os.pread(descriptor, keep - start, start).rfind(b"\n")
        if newline >= 0:
            keep = start + newline + 1
            break
        keep = start
    if keep < size:
        os.ftruncate(descriptor, keep)


def _write_all(descriptor: int, data: bytes) -> None:
    before = os.fstat(descriptor).st_size
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
            failpoint("journal.before_sync")
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):  # a half-written batch must not look like a whole one
            os.ftruncate(descriptor, before)
        raise


def _refused(path: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"disk full: cannot append to {path}: free space, then run again; nothing is lost")
    return StorageError(f"cannot append to {path} ({error.strerror}): fix the path or its permissions")

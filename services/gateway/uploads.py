"""Payloads that arrive in chunks: what is kept survives a kill, and only a whole one with its digest counts.

    <directory>/<client>/<digest>.part  --append, fsync-->  …  --digest verified-->  payload store

One unfinished payload per client: a device sends one at a time, and a second one takes the place of the first.
"""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from fednested_lib.blobs import BlobStore, refused
from fednested_lib.errors import PayloadError, SnapshotError
from fednested_lib.signing import sha256_hex

_log = structlog.get_logger(__name__)


class Uploads:
    """Unfinished payloads beside the store of whole ones. Not safe for two calls about one client at a time.

    Args:
        directory: of the unfinished ones.
        payloads: local store of the whole ones.
        max_bytes: largest payload.
    """

    def __init__(self, directory: Path, payloads: BlobStore, *, max_bytes: int):
        self._directory, self._payloads, self._max_bytes = Path(directory), payloads, max_bytes

    def holds(self, digest: str, size: int) -> bool:
        """Tell whether the whole payload is here, its bytes verified."""
        try:
            return os.path.getsize(self._payloads.location(digest)) == size and bool(
                self._payloads.get(digest, max_bytes=size)
            )
        except (OSError, SnapshotError):  # not there, or something else under its name: `append` puts it right
            return False

    def kept(self, client_id: str, digest: str, size: int) -> int:
        """Return how many bytes of a payload of `size` bytes are here."""
        return size if self.holds(digest, size) else _size(self._part(client_id, digest))

    def append(self, client_id: str, digest: str, start: int, data: bytes, size: int) -> int:
        """Add `data` durably if `start` is the end of what is kept, and return how many bytes are kept then.

        Raises:
            PayloadError: reason ``payload_too_large``.
            StorageError: the disk is full; what was kept stays.
        """
        if size > self._max_bytes:
            raise PayloadError("payload_too_large", f"payload must be at most {self._max_bytes} bytes, got {size}")
        part = self._part(client_id, digest)
        if start != _size(part) or self.holds(digest, size):
            return self.kept(client_id, digest, size)
        try:
            if start == 0:
                self._make_room(part)
            _append(part, data)
        except OSError as error:
            raise refused(part, error, len(data)) from error
        if start + len(data) < size:
            return start + len(data)
        return self._finish(client_id, digest, part, size)

    def _finish(self, client_id: str, digest: str, part: Path, size: int) -> int:
        whole = part.read_bytes()
        good = len(whole) == size and sha256_hex(whole) == digest
        if good:
            self._payloads.put(whole)
        else:
            _log.warning("gateway.upload_corrupt", client_id=client_id, digest=digest, size_bytes=len(whole))
        part.unlink()
        return size if good else 0

    def _make_room(self, part: Path) -> None:
        part.parent.mkdir(parents=True, exist_ok=True)
        for other in part.parent.iterdir():
            other.unlink()

    def _part(self, client_id: str, digest: str) -> Path:
        return self._directory / client_id / f"{digest}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:  # what a full disk lets through of it is a prefix, hence kept rightly
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

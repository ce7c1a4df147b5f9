"""Durable files and a content-addressed blob store (claim check, Hohpe and Woolf, *Enterprise Integration Patterns*).

A blob's name is the SHA-256 of its bytes, so a store can be shared, mirrored and resumed without coordination, and
every read is verified. Any fsspec URI serves; on a local file system a write is tmp, fsync, rename, fsync of the
directory, so that a blob that exists is whole.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from fednested_lib.errors import SnapshotError, StorageError, TransportError
from fednested_lib.failpoints import failpoint
from fednested_lib.signing import sha256_hex


def _refused(path: str | os.PathLike, error: OSError, size_bytes: int) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"disk full: cannot write {size_bytes} bytes to {path}: free space, then run again; nothing is lost"
        )
    return StorageError(
        f"cannot write {size_bytes} bytes to {path} ({error.strerror}): fix the path or its permissions"
    )


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_temporary(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_durable(path: str | os.PathLike, data: bytes) -> None:
    """Replace `path` by `data` atomically and durably.

    Raises:
        StorageError: the disk is full or the path cannot be written; the old file is untouched.
    """
    path = Path(path)
    try:
        temporary = _write_temporary(path, data)
        failpoint("durable.before_rename")
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    except OSError as error:
        raise _refused(path, error, len(data)) from error


def create_exclusive(path: str | os.PathLike, data: bytes) -> bool:
    """Create `path` with `data` if nobody else has: the compare-and-swap of the manifest chain.

    Returns:
        True if this call created it; False if it exists already (whatever it holds).

    Raises:
        StorageError: the disk is full or the path cannot be written.
    """
    path = Path(path)
    try:
        temporary = _write_temporary(path, data)
        try:
            os.link(temporary, path)  # fails when the target exists, unlike rename
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_directory(path.parent)
    except OSError as error:
        raise _refused(path, error, len(data)) from error
    return True


class BlobStore:
    """Content-addressed blobs under one URI (a local path or any fsspec URL).

    Args:
        uri: directory path, ``file://``, ``s3://``, ``memory://`` …
    """

    def __init__(self, uri: str | os.PathLike):
        self.uri = str(uri).removeprefix("file://").rstrip("/")
        self._local = "://" not in self.uri
        self._filesystem = None if self._local else _open_filesystem(self.uri)

    def location(self, digest: str) -> str:
        """Return where the blob of this digest lies or would lie."""
        return f"{self.uri}/{digest[:2]}/{digest}"

    def put(self, data: bytes) -> str:
        """Store `data` durably; a blob that is there already is not written again.

        Returns:
            The digest, 64 hex digits.

        Raises:
            StorageError: the disk is full or not writable.
            TransportError: a remote store does not answer.
        """
        digest = sha256_hex(data)
        if self.has(digest):
            return digest
        if self._local:
            write_durable(self.location(digest), data)
        else:
            self._remote("write", digest, lambda: self._filesystem.pipe_file(self.location(digest), data))
        return digest

    def get(self, digest: str) -> bytes:
        """Read and verify the blob of `digest`.

        Raises:
            SnapshotError: reason ``missing_blob`` or ``corrupt_blob``, with digest and place.
            TransportError: a remote store does not answer.
        """
        place = self.location(digest)
        try:
            if self._local:
                data = Path(place).read_bytes()
            else:
                data = self._remote("read", digest, lambda: self._filesystem.cat_file(place))
        except FileNotFoundError as error:
            raise SnapshotError(
                "missing_blob", f"blob {digest} is missing at {place}: restore it or replay the version"
            ) from error
        except OSError as error:
            raise StorageError(
                f"blob {digest} cannot be read at {place} ({error.strerror}): fix its permissions"
            ) from error
        found = sha256_hex(data)
        if found != digest:
            raise SnapshotError(
                "corrupt_blob",
                f"blob {digest} at {place} is corrupt (its bytes have digest {found}): "
                "restore it or replay the version",
            )
        return data

    def has(self, digest: str) -> bool:
        """Tell whether a blob of this name exists (its bytes are verified on read)."""
        place = self.location(digest)
        if self._local:
            return os.path.exists(place)
        return self._remote("look up", digest, lambda: self._filesystem.exists(place))

    def digests(self) -> Iterator[str]:
        """Yield the names of all blobs, in no particular order."""
        if self._local:
            paths = (str(path) for path in Path(self.uri).glob("[0-9a-f][0-9a-f]/*"))
        else:
            paths = iter(self._remote("list", "*", lambda: self._filesystem.glob(f"{self.uri}/*/*")))
        for path in paths:
            name = path.rsplit("/", 1)[-1]
            if len(name) == 64:
                yield name

    def _remote(self, verb: str, digest: str, call):
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:  # fsspec back ends raise whatever their client library raises
            raise TransportError(
                f"blob store {self.uri} failed to {verb} {digest} ({type(error).__name__}: {error}): "
                "check the address and credentials"
            ) from error


def _open_filesystem(uri: str):
    import fsspec

    try:
        filesystem, _ = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise TransportError(
            f"blob store {uri} cannot be opened ({error}): install its fsspec driver or fix the address"
        ) from error
    return filesystem

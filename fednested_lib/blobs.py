"""Durable files and a content-addressed blob store (claim check, Hohpe and Woolf, *Enterprise Integration Patterns*).

A blob's name is the SHA-256 of its bytes, so a store can be shared, mirrored and resumed without coordination, and
every read is verified. Any fsspec URI serves; on a local file system a write is tmp, fsync, rename, fsync of the
directory, so that a blob that exists is whole.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from fednested_lib.errors import SnapshotError, StorageError, TransportError
from fednested_lib.failpoints import failpoint
from fednested_lib.signing import sha256_hex

# Errors that speak of one object, not of the store it lies in.
_OF_ONE_OBJECT = (errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)


def refused(path: str | os.PathLike, error: OSError, size_bytes: int) -> StorageError:
    """Return our error for a file system that did not take so many bytes at `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"disk full: cannot write {size_bytes} bytes to {path}: free space, then run again; nothing is lost"
        )
    return StorageError(
        f"cannot write {size_bytes} bytes to {path} ({error.strerror}): fix the path or its permissions"
    )


def fsync_path(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
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
        fsync_path(path.parent)
    except OSError as error:
        raise refused(path, error, len(data)) from error


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
        fsync_path(path.parent)
    except OSError as error:
        raise refused(path, error, len(data)) from error
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

        In a local store the bytes that are there are compared, and replaced when they are others: whoever may write the
        directory may have left anything under that name.

        Returns:
            The digest, 64 hex digits.

        Raises:
            StorageError: the disk is full or not writable.
            TransportError: a remote store does not answer, or has no such bucket.
        """
        digest = sha256_hex(data)
        place = self.location(digest)
        if self._local:
            if not _holds(place, data):
                write_durable(place, data)
        elif not self.has(digest):
            try:
                self._remote("write", digest, lambda: self._filesystem.pipe_file(place, data))
            except FileNotFoundError as error:
                raise TransportError(
                    f"blob store {self.uri} does not exist, cannot write {digest}: create its bucket or directory, or "
                    "fix the address"
                ) from error
        return digest

    def get(self, digest: str, *, max_bytes: int | None = None) -> bytes:
        """Read and verify the blob of `digest`.

        Args:
            digest: 64 hex digits.
            max_bytes: refuse a larger blob before reading it; None reads any.

        Raises:
            SnapshotError: about this blob, with digest and place: reason ``missing_blob``, ``corrupt_blob``,
                ``oversize_blob`` or ``unreadable_blob`` (a directory, a pipe, no permission on it).
            StorageError: the store's directory cannot be read, or the disk fails.
            TransportError: a remote store does not answer.
        """
        place = self.location(digest)
        try:
            data = _read_file(place, max_bytes) if self._local else self._read_remote(digest, max_bytes)
        except FileNotFoundError as error:
            raise SnapshotError(
                "missing_blob", f"blob {digest} is missing at {place}: restore it or replay the version"
            ) from error
        except OverflowError as error:
            raise SnapshotError(
                "oversize_blob", f"blob {digest} at {place} must have at most {max_bytes} bytes, has {error}: remove it"
            ) from None
        except OSError as error:
            problem = error.strerror or str(error)
            if error.errno in _OF_ONE_OBJECT and self._readable():
                raise SnapshotError(
                    "unreadable_blob", f"blob {digest} cannot be read at {place} ({problem}): remove or restore it"
                ) from error
            raise StorageError(f"blob {digest} cannot be read at {place} ({problem}): fix its permissions") from error
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

    def _readable(self) -> bool:
        """Tell whether the store as such answers, so that what failed is the one object."""
        if self._local:
            return os.path.isdir(self.uri) and os.access(self.uri, os.R_OK | os.X_OK)
        try:
            self._filesystem.ls(self.uri)
        except Exception:  # whatever the back end raises: then it is not the object
            return False
        return True

    def _read_remote(self, digest: str, max_bytes: int | None) -> bytes:
        place = self.location(digest)
        try:
            if max_bytes is not None:
                size = self._remote("look up", digest, lambda: self._filesystem.size(place))
                if size is not None and size > max_bytes:
                    raise OverflowError(size)
            return self._remote("read", digest, lambda: self._filesystem.cat_file(place))
        except TransportError as error:
            cause = error.__cause__
            if isinstance(cause, IsADirectoryError | PermissionError) and self._readable():
                raise IsADirectoryError(errno.EISDIR, str(cause)) from error
            raise

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


def _holds(place: str, data: bytes) -> bool:
    """Tell whether a regular file at `place` holds exactly `data`; its size is compared first."""
    try:
        found = os.stat(place)
        return stat.S_ISREG(found.st_mode) and found.st_size == len(data) and Path(place).read_bytes() == data
    except OSError:  # absent or unreadable: writing it says why it cannot be, if it cannot
        return False


def _read_file(place: str, max_bytes: int | None) -> bytes:
    """Read a regular file of bounded size; a pipe would block for ever, a device file would never end."""
    descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "not a regular file")
    with open(descriptor, "rb") as file:
        if max_bytes is None:
            return file.read()
        data = b"" if found.st_size > max_bytes else file.read(max_bytes + 1)
        if max(found.st_size, len(data)) > max_bytes:
            raise OverflowError(max(found.st_size, len(data)))
        return data


def _open_filesystem(uri: str):
    import fsspec

    try:
        filesystem, _ = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise TransportError(
            f"blob store {uri} cannot be opened ({error}): install its fsspec driver or fix the address"
        ) from error
    return filesystem

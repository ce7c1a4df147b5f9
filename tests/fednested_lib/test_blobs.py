"""The blob store as the two sides see it: what lies under a name is never trusted for its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import SnapshotError, StorageError, TransportError
from fednested_lib.signing import sha256_hex

DATA = b"the bytes that were signed"
DIGEST = sha256_hex(DATA)


def _occupy(store: BlobStore) -> Path:
    place = Path(store.location(DIGEST))
    place.parent.mkdir(parents=True)
    return place


def _reason(store: BlobStore, **options) -> str:
    with pytest.raises(SnapshotError) as caught:
        store.get(DIGEST, **options)
    return caught.value.reason


@pytest.mark.parametrize("planted", [b"x" * len(DATA), b"short", b"", DATA + b"!"])
def test_put_replaces_wrong_bytes_under_its_name(tmp_path, planted):
    """A file that somebody left at the digest does not stand in for the bytes, whatever its size."""
    store = BlobStore(tmp_path)
    _occupy(store).write_bytes(planted)
    assert store.get(store.put(DATA)) == DATA


def test_put_leaves_right_bytes_alone(tmp_path):
    """The same blob again writes nothing: the file stays the one it was."""
    store = BlobStore(tmp_path)
    place = store.location(store.put(DATA))
    before = os.stat(place)
    store.put(DATA)
    assert (os.stat(place).st_ino, os.stat(place).st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_get_checks_the_size_before_it_reads(tmp_path, scheme):
    """A blob at the bound is read; one byte more is refused as oversize, before its digest is looked at."""
    store = BlobStore(tmp_path if scheme == "local" else f"memory://{tmp_path.name}")
    store.put(DATA)
    assert store.get(DIGEST, max_bytes=len(DATA)) == DATA
    assert _reason(store, max_bytes=len(DATA) - 1) == "oversize_blob"


def test_get_does_not_load_a_huge_file(tmp_path):
    """A sparse file of a terabyte is refused by its size, not by running out of memory."""
    store = BlobStore(tmp_path)
    with open(_occupy(store), "wb") as file:
        file.truncate(1 << 40)
    assert _reason(store, max_bytes=1 << 20) == "oversize_blob"


PLANTED = {
    "directory": lambda place: place.mkdir(),
    "pipe": os.mkfifo,
    "device": lambda place: place.symlink_to("/dev/zero"),
    "loop": lambda place: place.symlink_to(place),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_not_a_file_is_one_unreadable_blob(tmp_path, kind):
    """A directory, pipe, device or link loop under a digest is that blob's fault, and reading it ends."""
    store = BlobStore(tmp_path)
    PLANTED[kind](_occupy(store))
    assert _reason(store, max_bytes=100) == _reason(store) == "unreadable_blob"


def test_a_file_in_place_of_the_shard_is_one_unreadable_blob(tmp_path):
    """So is a file where the digest's directory should be."""
    (tmp_path / DIGEST[:2]).write_bytes(b"")
    assert _reason(BlobStore(tmp_path)) == "unreadable_blob"


def test_a_store_that_is_no_directory_is_nobodys_blob(tmp_path):
    """When the store itself cannot be read, that is said of the store, so that no update is refused for it."""
    (tmp_path / "store").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be read"):
        BlobStore(tmp_path / "store").get(DIGEST)


def test_a_remote_directory_is_one_unreadable_blob(tmp_path):
    """In a remote store a directory under a digest is unreadable as well."""
    _occupy(BlobStore(tmp_path)).mkdir()
    store = BlobStore(f"local://{tmp_path}")
    assert _reason(store, max_bytes=1 << 20) == "unreadable_blob"


def test_a_missing_bucket_is_named_with_its_remedy(tmp_path):
    """Writing into a remote store whose bucket does not exist says so; it is no bare FileNotFoundError."""
    store = BlobStore(f"local://{tmp_path}/no-such-bucket")
    with pytest.raises(TransportError, match="no-such-bucket does not exist.*create its bucket"):
        store.put(DATA)

"""The contract of payload store and snapshot source, held by a directory and by a gateway alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import SnapshotError
from fednested_lib.gateway_store import GatewayStore
from fednested_lib.log import InMemoryLog
from fednested_lib.signing import sha256_hex
from fednested_lib.transport import BlobSource, PayloadStore
from tests.gateway import connect, make_gateway, serving

CHUNK = 4096


@dataclass
class Subject:
    payloads: PayloadStore
    source: BlobSource
    dropped: BlobStore  # where tier 1 finds payloads
    published: BlobStore  # where tier 1 puts blobs


@pytest.fixture(params=["directory", "gateway"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    dropped, published = BlobStore(tmp_path / "tier1/payloads"), BlobStore(tmp_path / "tier1/blobs")
    if request.param == "directory":
        yield Subject(dropped, published, dropped, published)
        return
    with serving(make_gateway(tmp_path / "tier1", InMemoryLog()).app()) as url:
        store = GatewayStore(connect(url), tmp_path / "partials", chunk_bytes=CHUNK)
        yield Subject(store, store, dropped, published)


@pytest.mark.parametrize("size", [1, CHUNK, CHUNK + 1, 5 * CHUNK])
def test_bytes_arrive_as_they_went(subject: Subject, size: int):
    """Either way, at every boundary of a chunk, and a second time without harm."""
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    digest = sha256_hex(data)
    for _ in range(2):
        assert subject.payloads.put(data) == digest
        assert subject.dropped.get(digest) == data
    subject.published.put(data)
    for _ in range(2):
        assert subject.source.get(digest) == data


def test_other_bytes_under_a_payloads_name_are_replaced(subject: Subject):
    """Whoever may write the drop box may have left anything there; the device's payload counts."""
    digest = subject.payloads.put(b"payload")
    Path(subject.dropped.location(digest)).write_bytes(b"garbage")
    subject.payloads.put(b"payload")
    assert subject.dropped.get(digest) == b"payload"


@pytest.mark.parametrize("case", ["missing_blob", "corrupt_blob", "oversize_blob"])
def test_a_blob_that_is_not_what_was_asked_for_is_named(subject: Subject, case: str):
    """The same reason from both, with the digest, so that the same remedies hold."""
    digest = subject.published.put(b"blob")
    place = Path(subject.published.location(digest))
    if case == "missing_blob":
        place.unlink()
    elif case == "corrupt_blob":
        place.write_bytes(b"rot!")
    with pytest.raises(SnapshotError, match=digest) as refused:
        subject.source.get(digest, max_bytes=3 if case == "oversize_blob" else None)
    assert refused.value.reason == case


def test_an_empty_blob_is_a_blob(subject: Subject):
    """Nothing is a content too."""
    assert subject.source.get(subject.published.put(b"")) == b""

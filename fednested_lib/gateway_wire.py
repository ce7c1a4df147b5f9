"""What a device and the gateway say to each other: signed requests, records as JSON, payloads in chunks.

    signature = Ed25519("fednested.request/1", client, time, method, path?query; one a line),  |time − server's| ≤ 5 min

Every request names its client, so the gateway serves registered devices alone and counts per device. A request that
somebody repeats within the window reads the same bytes or stores the same content-addressed ones, which is harmless.
Bytes of a record travel in base64 and reach the log as they are: envelopes and events carry signatures of their own.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fednested_lib.errors import PayloadError
from fednested_lib.log import Record

CLIENT_HEADER, TIME_HEADER, SIGNATURE_HEADER = "fednested-client", "fednested-time", "fednested-signature"
OFFSET_HEADER = "upload-offset"  # bytes of a payload that the gateway keeps, or where a chunk begins
CLOCK_WINDOW_S = 300
MAX_CHUNK_BYTES = 8 << 20
MAX_PAGE_BYTES = 1 << 20  # of records in one answer, unless one alone is larger
MAX_ANSWER_BYTES = 8 << 20  # of JSON

Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")]


class WireRecord(BaseModel):
    """One record of the log; `offset` is there when the gateway gives it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    key: Base64
    value: Base64
    headers: dict[str, Base64]
    offset: int | None = Field(default=None, ge=0)

    @classmethod
    def of(cls, key: bytes, value: bytes, headers: dict[str, bytes], offset: int | None = None) -> WireRecord:
        """Encode the parts of a record."""
        return cls(
            key=_text(key),
            value=_text(value),
            headers={name: _text(each) for name, each in headers.items()},
            offset=offset,
        )

    def record(self, topic: str, partition: int) -> Record:
        """Decode to a record of the log; without an offset it gets 0.

        Raises:
            PayloadError: reason ``bad_record``: not base64.
        """
        try:
            headers = {name: base64.b64decode(each, validate=True) for name, each in self.headers.items()}
            key, value = (base64.b64decode(each, validate=True) for each in (self.key, self.value))
        except binascii.Error as error:
            raise PayloadError("bad_record", f"record for {topic} is not base64: {error}") from None
        return Record(
            topic=topic,
            partition=partition,
            offset=self.offset or 0,
            key=key,
            value=value,
            headers=tuple(sorted(headers.items())),
        )


class Page(BaseModel):
    """Some records of one partition, from the first that was asked for."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    records: list[WireRecord]


class TopicState(BaseModel):
    """Identity and watermarks of a topic (partition → oldest offset, next offset), and when to look again."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    identity: Annotated[str, Field(max_length=1024)]
    watermarks: dict[
        Annotated[str, Field(pattern=r"^\d{1,6}$")], Annotated[list[int], Field(min_length=2, max_length=2)]
    ]
    next_poll_s: float = Field(ge=0, le=86_400, allow_inf_nan=False)


class Place(BaseModel):
    """Where the log acknowledged a record."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    partition: int = Field(ge=0)
    offset: int = Field(ge=0)


class Refusal(BaseModel):
    """Why the gateway refuses: a class of `errors`, its machine-readable reason, a sentence for a person."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    error: Annotated[str, Field(max_length=64)]
    reason: Annotated[str, Field(max_length=64)] = ""
    message: Annotated[str, Field(max_length=2000)] = ""


def parse_refusal(body: bytes) -> Refusal | None:
    """Return what the gateway said, None if somebody else (a proxy) said it."""
    try:
        return Refusal.model_validate_json(body)
    except ValidationError:
        return None


def request_text(method: str, target: str, client_id: str, time_s: int) -> bytes:
    """Return the bytes that a device signs; `target` is the path below the gateway's URL with its query."""
    return f"fednested.request/1\n{client_id}\n{time_s}\n{method}\n{target}".encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()

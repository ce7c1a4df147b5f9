"""The gateway's requests. Every one but `/healthz` is signed by a registered device (`fednested_lib/gateway_wire.py`).

    HEAD  /v1/payloads/<digest>?size=n          204, Upload-Offset: bytes kept
    PATCH /v1/payloads/<digest>                 Content-Range: a chunk; 204, or 409 if not at the end; Upload-Offset
    POST  /v1/topics/<topic>/records            a record, checked → partition and offset after the broker's word
    GET   /v1/topics/<topic>                    identity, watermarks, when to look again
    GET   /v1/topics/<topic>/records?partition=&start=&end=
    GET   /v1/blobs/<digest>                    Range: a part of a blob of a snapshot

Answers carry `Date`. What blocks (broker, disk) runs in threads; of one client one append or upload at a time.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Container, Mapping

import structlog
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ContractError, FednestedError, LogError, PayloadError, StorageError, TransportError
from fednested_lib.gateway_wire import (
    MAX_CHUNK_BYTES,
    MAX_PAGE_BYTES,
    OFFSET_HEADER,
    Page,
    Place,
    Refusal,
    TopicState,
    WireRecord,
)
from fednested_lib.log import CONTROL, MAX_RECORD_BYTES, Record, UpdateLog, check_size
from services.gateway.admit import Buckets, Check, Throttled, Unknown, identify
from services.gateway.places import Places
from services.gateway.uploads import Uploads
from tier1.config import DeviceRecord

MAX_RECORD_BODY = 2 * MAX_RECORD_BYTES  # base64 and JSON around it
MAX_PAGE_RECORDS = 1024
RETRY_AFTER_S = 1
ACTIVE_S = 600.0
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{1,15})")
_log = structlog.get_logger(__name__)


class Gateway:
    """What the requests do.

    Args:
        log: the update log; its topics exist.
        blobs: local store of what snapshots consist of.
        uploads: payloads.
        places: of updates in `log`.
        devices: registered ones.
        checks: topic → what may be appended to it by a device.
        readable: topics that a device may read.
        buckets: how often a client may ask.
        polls_per_s: looks at a topic that all devices together are asked to keep to.
        min_poll_s: the shortest wait that a device is asked for.
    """

    def __init__(
        self,
        log: UpdateLog,
        *,
        blobs: BlobStore,
        uploads: Uploads,
        places: Places,
        devices: Mapping[str, DeviceRecord],
        checks: Mapping[str, Check],
        readable: Container[str] = (CONTROL,),
        buckets: Buckets,
        polls_per_s: float = 50.0,
        min_poll_s: float = 0.5,
    ):
        self._log, self._blobs, self._uploads, self._places = log, blobs, uploads, places
        self._devices, self._checks, self._readable, self._buckets = devices, checks, readable, buckets
        self._polls_per_s, self._min_poll_s = polls_per_s, min_poll_s
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # of registered clients, hence bounded

    def app(self) -> Starlette:
        """Return the ASGI application."""
        topic = "/v1/topics/{topic}"
        return Starlette(
            routes=[
                Route("/healthz", lambda _request: Response("ok", media_type="text/plain")),
                Route("/v1/payloads/{digest}", self._guard(self._kept), methods=["HEAD"]),
                Route("/v1/payloads/{digest}", self._guard(self._chunk), methods=["PATCH"]),
                Route(topic, self._guard(self._state), methods=["GET"]),
                Route(f"{topic}/records", self._guard(self._records), methods=["GET"]),
                Route(f"{topic}/records", self._guard(self._post), methods=["POST"]),
                Route("/v1/blobs/{digest}", self._guard(self._blob), methods=["GET"]),
            ]
        )

    # Requests -----------------------------------------------------------------------------------------------------

    async def _kept(self, request: Request, client_id: str) -> Response:
        digest, size = _digest(request), _number(request.query_params.get("size"))
        async with self._locks[client_id]:
            return _offset(204, await run_in_threadpool(self._uploads.kept, client_id, digest, size))

    async def _chunk(self, request: Request, client_id: str) -> Response:
        digest, place = _digest(request), _CHUNK.fullmatch(request.headers.get("content-range", ""))
        if place is None:
            raise PayloadError("bad_request", "Content-Range must be bytes first-last/size")
        first, last, size = map(int, place.groups())
        data = await _body(request, MAX_CHUNK_BYTES)
        if last - first + 1 != len(data) or last >= size:
            raise PayloadError(
                "bad_request", f"Content-Range names {last - first + 1} bytes, the chunk has {len(data)}"
            )
        async with self._locks[client_id]:
            offset = await run_in_threadpool(self._uploads.append, client_id, digest, first, data, size)
        return _offset(204 if offset == last + 1 else 409, offset)

    async def _post(self, request: Request, client_id: str) -> Response:
        topic = request.path_params["topic"]
        check = self._checks.get(topic)
        if check is None:
            raise PayloadError("bad_topic", f"devices do not send to topic {topic[:100]!r}")
        record = _parse(topic, await _body(request, MAX_RECORD_BODY))
        async with self._locks[client_id]:
            update_id = await run_in_threadpool(check, record, client_id)
            partition, offset = await run_in_threadpool(self._places.append, record, update_id)
        _log.info("gateway.appended", client_id=client_id, topic=topic, partition=partition, offset=offset)
        return _json(Place(partition=partition, offset=offset), 201)

    async def _state(self, request: Request, client_id: str) -> Response:
        topic = self._topic(request)
        identity = await run_in_threadpool(self._log.identity, topic)
        marks = await run_in_threadpool(self._log.watermarks, topic)
        watermarks = {str(partition): [low, high] for partition, (low, high) in marks.items()}
        return _json(TopicState(identity=identity, watermarks=watermarks, next_poll_s=self._next_poll_s()))

    async def _records(self, request: Request, client_id: str) -> Response:
        asked = {name: _number(request.query_params.get(name)) for name in ("partition", "start", "end")}
        return _json(Page(records=await run_in_threadpool(self._page, self._topic(request), **asked)))

    async def _blob(self, request: Request, client_id: str) -> Response:
        digest, asked = _digest(request), _RANGE.fullmatch(request.headers.get("range", ""))
        if asked is None or not 0 <= int(asked[2]) - int(asked[1]) < MAX_CHUNK_BYTES:
            raise PayloadError("bad_request", f"Range must be bytes=first-last of at most {MAX_CHUNK_BYTES} bytes")
        first = int(asked[1])
        found = await run_in_threadpool(_read_range, self._blobs.location(digest), first, int(asked[2]))
        if found is None:
            return _refuse(404, PayloadError("missing_blob", f"blob {digest} is not here"))
        data, size = found
        headers = {"content-range": f"bytes {first}-{first + len(data) - 1}/{size}", "etag": f'"{digest}"'}
        if not data:
            return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
        return Response(data, 206, headers, media_type="application/octet-stream")

    # What they share ------------------------------------------------------------------------------------------------

    def _guard(self, handle: Callable[[Request, str], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Let registered devices in, not too often, and turn errors into answers."""

        async def guarded(request: Request) -> Response:
            try:
                client_id = identify(request.headers, request.method, _target(request), self._devices)
                self._buckets.take(client_id)
                return await handle(request, client_id)
            except FednestedError as error:
                return _answer(error, request)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it

        return guarded

    def _topic(self, request: Request) -> str:
        topic = request.path_params["topic"]
        if topic not in self._readable:
            raise PayloadError("bad_topic", f"devices do not read topic {topic[:100]!r}")
        return topic

    def _page(self, topic: str, *, partition: int, start: int, end: int) -> list[WireRecord]:
        found: list[WireRecord] = []
        size_bytes = 0
        records = self._log.read(topic, {partition: (start, end)})
        for record in records:
            size_bytes += len(record.key) + len(record.value) + sum(len(value) for _, value in record.headers)
            if found and size_bytes > MAX_PAGE_BYTES:
                break
            found.append(WireRecord.of(record.key, record.value, dict(record.headers), record.offset))
            if len(found) == MAX_PAGE_RECORDS:
                break
        return found

    def _next_poll_s(self) -> float:
        """Return a wait that spreads the devices of now over the looks that are asked for (pace steering)."""
        wait_s = max(self._min_poll_s, self._buckets.active(ACTIVE_S) / self._polls_per_s)
        return round(wait_s * random.uniform(0.8, 1.2), 3)


async def _body(request: Request, limit: int) -> bytes:
    """Return the whole body; too large a one is not read to its end."""
    pieces, size_bytes = [], 0
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared[:16]) > limit:
        raise PayloadError("body_too_large", f"body must be at most {limit} bytes")
    async for piece in request.stream():
        size_bytes += len(piece)
        if size_bytes > limit:
            raise PayloadError("body_too_large", f"body must be at most {limit} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _parse(topic: str, body: bytes) -> Record:
    try:
        record = WireRecord.model_validate_json(body).record(topic, 0)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, first["loc"]))[:100] or "body"
        raise PayloadError("bad_record", f"record has a bad {field}: {first['msg']}") from None
    check_size(topic, record.key, record.value, dict(record.headers))
    return record


def _read_range(path: str, first: int, last: int) -> tuple[bytes, int] | None:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return os.pread(file.fileno(), last - first + 1, first), size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"blob {path} cannot be read ({error.strerror}): fix its permissions") from error


def _target(request: Request) -> str:
    query = request.scope["query_string"]
    return (request.scope["raw_path"] + (b"?" + query if query else b"")).decode("latin-1")


def _digest(request: Request) -> str:
    digest = request.path_params["digest"]
    if not _DIGEST.fullmatch(digest):
        raise PayloadError("bad_request", "a digest is 64 hex digits")
    return digest


def _number(text: str | None) -> int:
    try:
        return int((text or "")[:18])
    except ValueError:
        raise PayloadError("bad_request", "partition, start, end and size are whole numbers") from None


def _offset(status: int, offset: int) -> Response:
    return Response(status_code=status, headers={OFFSET_HEADER: str(offset)})


def _json(document: BaseModel, status: int = 200) -> Response:
    return Response(document.model_dump_json(exclude_none=True), status, media_type="application/json")


def _answer(error: FednestedError, request: Request) -> Response:
    """Return the status of an error: 4xx is the request's, 5xx is ours."""
    if isinstance(error, Unknown):
        return _refuse(401, error)
    if isinstance(error, Throttled):
        return _refuse(429, error, math.ceil(error.retry_after_s))
    if isinstance(error, LogError):
        return _refuse(416, error)
    if isinstance(error, ContractError):
        status = {"missing_payload": 409, "body_too_large": 413, "payload_too_large": 413}.get(error.reason, 422)
        return _refuse(status, error)
    _log.warning("gateway.failed", path=request.url.path, error=type(error).__name__, problem=str(error))
    status = 507 if isinstance(error, StorageError) else 503 if isinstance(error, TransportError) else 500
    return _refuse(status, error, RETRY_AFTER_S)


def _refuse(status: int, error: FednestedError, retry_after_s: int | None = None) -> Response:
    told = Refusal(error=type(error).__name__, reason=getattr(error, "reason", ""), message=str(error)[:2000])
    # The rest of a body that is not read would be taken for the next request.
    headers = {"connection": "close"} | ({} if retry_after_s is None else {"retry-after": str(retry_after_s)})
    return Response(told.model_dump_json(), status, headers, media_type="application/json")

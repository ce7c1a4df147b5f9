"""Payloads to the gateway and blobs from it, in chunks that are never sent twice but the one that was cut.

    put   ask how much is kept → PATCH chunk after chunk → the last answer says: whole, its digest verified
    get   GET range after range, appended to <partials>/<digest> → verified → returned

What the gateway or this device keeps survives both their restarts. A digest names the content, so it is all the
coordination there is; a partial that turns out to be something else is thrown away and begun again, once.
"""

from __future__ import annotations

import re
from pathlib import Path

from fednested_lib.blobs import refused
from fednested_lib.errors import PayloadError, SnapshotError, TransportError
from fednested_lib.failpoints import failpoint
from fednested_lib.gateway_http import Answer, GatewayHttp
from fednested_lib.gateway_wire import OFFSET_HEADER, parse_refusal
from fednested_lib.signing import sha256_hex

MAX_BLOB_BYTES = 4 << 30
_MAX_TURNS = 3  # how often a gateway may say another offset before it is no transfer any more
_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")


class GatewayStore:
    """A device's half of the payload and blob stores, through the gateway.

    Args:
        gateway: where it is.
        partials: directory of this device for blobs that are not whole yet.
        chunk_bytes: most that is lost by a cut, either way.
    """

    def __init__(self, gateway: GatewayHttp, partials: Path, *, chunk_bytes: int = 1 << 20):
        self.uri = gateway.url
        self._gateway, self._partials, self._chunk_bytes = gateway, Path(partials), chunk_bytes

    def put(self, data: bytes) -> str:
        """Upload a payload from where the last attempt ended.

        Returns:
            The digest, 64 hex digits.

        Raises:
            PayloadError: the gateway refuses it for good, e.g. for its size.
            TransportError: it does not answer, or not to the end.
        """
        digest = sha256_hex(data)
        target = f"/v1/payloads/{digest}"
        answer = self._gateway.ask("HEAD", f"{target}?size={len(data)}")
        offset, turns = self._offset(target, answer, len(data)), 0
        while offset < len(data):
            end = min(offset + self._chunk_bytes, len(data))
            headers = {
                "Content-Range": f"bytes {offset}-{end - 1}/{len(data)}",
                "Content-Type": "application/octet-stream",
            }
            answer = self._gateway.ask("PATCH", target, body=data[offset:end], headers=headers)
            failpoint("gateway.after_chunk")
            offset = self._offset(target, answer, len(data))
            turns += offset != end
            if turns > _MAX_TURNS:
                raise self._gateway.unintelligible(target, f"offset {offset} after byte {end} was sent")
        return digest

    def get(self, digest: str, *, max_bytes: int | None = None) -> bytes:
        """Download and verify a blob from where the last attempt ended.

        Raises:
            SnapshotError: reason ``missing_blob``, ``oversize_blob`` or ``corrupt_blob`` (at the gateway).
            StorageError: this device's disk is full.
            TransportError: the gateway does not answer, or not to the end; what came is kept.
        """
        partial = self._partials / digest
        for begun_before in (partial.exists(), False):
            data = self._complete(digest, partial, MAX_BLOB_BYTES if max_bytes is None else max_bytes)
            partial.unlink(missing_ok=True)
            if sha256_hex(data) == digest:
                return data
            if not begun_before:
                break
        raise SnapshotError(
            "corrupt_blob",
            f"blob {digest} of gateway {self.uri} is corrupt: restore it at tier 1 or replay the version",
        )

    def sweep(self) -> None:
        """Remove partial blobs: nothing that is needed is missing."""
        if self._partials.is_dir():
            for path in self._partials.iterdir():
                path.unlink(missing_ok=True)

    def _complete(self, digest: str, partial: Path, max_bytes: int) -> bytes:
        try:
            self._partials.mkdir(parents=True, exist_ok=True)
            with open(partial, "ab") as file:
                while (chunk := self._range(digest, file.tell(), max_bytes)) is not None:
                    file.write(chunk[0])
                    file.flush()  # to the page cache: a kill keeps it, and after a power cut the digest tells
                    failpoint("gateway.after_range")
                    if file.tell() >= chunk[1]:
                        break
            return partial.read_bytes()
        except OSError as error:
            raise refused(partial, error, self._chunk_bytes) from error

    def _range(self, digest: str, start: int, max_bytes: int) -> tuple[bytes, int] | None:
        """Return the bytes from `start` and the size of the blob, None if there are none behind `start`."""
        target = f"/v1/blobs/{digest}"
        answer = self._gateway.ask(
            "GET",
            target,
            headers={"Range": f"bytes={start}-{start + self._chunk_bytes - 1}"},
            max_bytes=max(self._chunk_bytes, 1 << 16),
        )
        if answer.status == 416:
            return None
        if answer.status == 404:
            raise SnapshotError(
                "missing_blob", f"blob {digest} is missing at gateway {self.uri}: restore it or replay the version"
            )
        found = _RANGE.fullmatch(answer.headers.get("content-range", ""))
        first, last, size = map(int, found.groups()) if found else (-1, -1, -1)
        if answer.status != 206 or first != start or last - first + 1 != len(answer.body) or not answer.body:
            raise self._gateway.unintelligible(target, f"status {answer.status} for the bytes from {start}")
        if size > max_bytes:
            raise SnapshotError(
                "oversize_blob", f"blob {digest} of gateway {self.uri} must have at most {max_bytes} bytes, has {size}"
            )
        return answer.body, size

    def _offset(self, target: str, answer: Answer, size: int) -> int:
        """Return how much the gateway keeps."""
        if answer.status >= 400 and answer.status != 409:
            told = parse_refusal(answer.body)
            said = told.message if told else "no reason given"
            if answer.status == 404:
                raise TransportError(f"gateway {self.uri} knows no uploads ({answer.status}): check gateway.url")
            reason = told.reason if told and told.reason else f"http_{answer.status}"
            raise PayloadError(reason, f"gateway refuses the payload of {size} bytes ({answer.status}): {said}")
        text = answer.headers.get(OFFSET_HEADER, "")
        if not (text.isascii() and text.isdigit()) or int(text[:16]) > size:
            raise self._gateway.unintelligible(target, f"{OFFSET_HEADER} {text[:20]!r}")
        return int(text)

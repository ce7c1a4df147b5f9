"""HTTP to the gateway: signed, bounded in size and time, over TLS, with no library but Python's own.

Connections are kept alive and safe for threads. One that the server closed meanwhile is replaced once without a word,
because everything that is asked here may be asked twice. Redirects are not followed and proxies of the environment not
used: a device talks to the one address in its file. The server's `Date` gives the offset of this device's clock, which
is never changed, only allowed for.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from fednested_lib.errors import ConfigError, TransportError
from fednested_lib.gateway_wire import (
    CLIENT_HEADER,
    CLOCK_WINDOW_S,
    MAX_ANSWER_BYTES,
    SIGNATURE_HEADER,
    TIME_HEADER,
    parse_refusal,
    request_text,
)
from fednested_lib.signing import Signer

MAX_RETRY_AFTER_S = 3600.0
_PIECE_BYTES = 64 << 10
# About the way or the device, not about what was sent: trying again may help.
_RECOVERABLE = {401, 403, 407, 408, 421, 425, 429}
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the gateway said; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class GatewayHttp:
    """Requests of one device to the gateway at `url`.

    Args:
        url: ``https://host[:port][/prefix]``, or http inside a VPN.
        client_id: this device, as registered at tier 1.
        signer: its key.
        timeout_s: bound of connecting, of every wait for bytes, and of an answer that is no chunk of a blob.
        ca_file: certificates that vouch for the server; None: those of the system.
        cert_file: certificate of this device, where the gateway or its proxy asks for one.
        key_file: its key.
        clock: this device's, seconds since the epoch.

    Raises:
        ConfigError: the address is none, or a certificate cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        client_id: str,
        signer: Signer,
        timeout_s: float = 30.0,
        ca_file: Path | None = None,
        cert_file: Path | None = None,
        key_file: Path | None = None,
        clock: Callable[[], float] = time.time,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ConfigError(f"gateway.url must be https://host[:port][/prefix], got {url!r}: fix it")
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self.skew_s = 0.0  # server's clock − ours
        self._clock = clock
        self._client_id, self._signer = client_id, signer
        self._address, self._prefix = (parts.hostname, parts.port), parts.path.rstrip("/")
        self._tls = _tls(ca_file, cert_file, key_file) if parts.scheme == "https" else None
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []

    def ask(
        self,
        method: str,
        target: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> Answer:
        """Send a request and return the answer: 2xx, or a 4xx that speaks of what was asked.

        Raises:
            TransportError: no whole answer in time, a 5xx, a redirect, or a 4xx about the way or this device; with the
                server's Retry-After.
        """
        skew_s = self.skew_s
        answer = self._ask(method, target, body, headers or {}, max_bytes)
        if (
            answer.status == 401 and abs(self.skew_s - skew_s) > CLOCK_WINDOW_S / 10
        ):  # the answer told how far off we are
            answer = self._ask(method, target, body, headers or {}, max_bytes)
        if answer.status >= 500 or answer.status in _RECOVERABLE or answer.status < 200 or 300 <= answer.status < 400:
            raise self._problem(method, target, answer)
        return answer

    def close(self) -> None:
        """Let go of connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def unintelligible(self, target: str, problem: str) -> TransportError:
        """Return the error for an answer that no gateway gives."""
        return TransportError(f"gateway {self.url} answered {target} with {problem}: check gateway.url and its proxy")

    def _ask(self, method: str, target: str, body: bytes, headers: Mapping[str, str], max_bytes: int) -> Answer:
        connection, used = self._take()
        try:
            try:
                answer = self._once(connection, method, target, body, headers, max_bytes)
            except (http.client.RemoteDisconnected, ConnectionError):
                connection.close()
                if not used:
                    raise
                connection = self._connection()  # an idle one that the server had closed
                answer = self._once(connection, method, target, body, headers, max_bytes)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a header that is no number
            connection.close()
            raise TransportError(
                f"gateway {self.url} gave no answer to {method} {target.partition('?')[0]} "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): "
                "check the network, gateway.url and its certificate"
            ) from error
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)
        return answer

    def _once(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        body: bytes,
        headers: Mapping[str, str],
        max_bytes: int,
    ) -> Answer:
        began, deadline = self._clock(), time.monotonic() + 2 * self.timeout_s
        connection.request(
            method, self._prefix + target, body=body or None, headers={**self._signed(method, target), **headers}
        )
        response = connection.getresponse()
        pieces, size_bytes = [], 0
        for piece in _read(response):
            pieces.append(piece)
            size_bytes += len(piece)
            if size_bytes > max_bytes:
                raise http.client.HTTPException(f"an answer of more than {max_bytes} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not done after {2 * self.timeout_s:g} s")
        response.close()  # the answer, not the connection
        found = {name.lower(): value for name, value in response.getheaders()}
        self._note_date(found, (began + self._clock()) / 2)
        return Answer(status=response.status, headers=found, body=b"".join(pieces))

    def _signed(self, method: str, target: str) -> dict[str, str]:
        time_s = int(self._clock() + self.skew_s)
        signature = self._signer.sign(request_text(method, target, self._client_id, time_s))
        return {CLIENT_HEADER: self._client_id, TIME_HEADER: str(time_s), SIGNATURE_HEADER: signature}

    def _note_date(self, headers: Mapping[str, str], ours_s: float) -> None:
        theirs_s = _date(headers.get("date"))
        if theirs_s is None:
            return
        skew_s = theirs_s - ours_s
        if abs(skew_s - self.skew_s) > CLOCK_WINDOW_S / 10:
            _log.warning("gateway.clock_skew", skew_s=round(skew_s))
        if abs(skew_s - self.skew_s) > 2:  # a Date is whole seconds
            self.skew_s = skew_s

    def _problem(self, method: str, target: str, answer: Answer) -> TransportError:
        told, what = parse_refusal(answer.body), f"{method} {target.partition('?')[0]}"
        said = f": {told.message}" if told and told.message else ""
        retry_after_s = self._retry_after(answer)
        if 300 <= answer.status < 400:
            said = ": redirects are not followed, set gateway.url to the gateway itself"
        elif answer.status in (401, 403) and not said:
            said = (
                ": the gateway or its proxy does not know this device, see gateway.cert_file and the devices of tier 1"
            )
        elif not said:
            said = ": try again later"
        return TransportError(
            f"gateway {self.url} answered {what} with {answer.status}{said}", retry_after_s=retry_after_s
        )

    def _retry_after(self, answer: Answer) -> float | None:
        text = answer.headers.get("retry-after", "")
        if text.isascii() and text.isdigit():
            return min(float(text[:9]), MAX_RETRY_AFTER_S)
        until_s = _date(text)
        if until_s is None:
            return None
        now_s = _date(answer.headers.get("date")) or self._clock() + self.skew_s
        return min(max(until_s - now_s, 0.0), MAX_RETRY_AFTER_S)

    def _take(self) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        return self._connection(), False

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._address
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=self.timeout_s)
        return http.client.HTTPSConnection(host, port, timeout=self.timeout_s, context=self._tls)


def _read(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield what arrives, as it arrives; `HTTPResponse.read` waits for all and is silent when the end is missing."""
    left = response.length
    if left is None:  # in chunks, which say themselves that they are cut
        while piece := response.read1(_PIECE_BYTES):
            yield piece
        return
    while left > 0:
        piece = response.fp.read1(min(left, _PIECE_BYTES))
        if not piece:
            raise http.client.IncompleteRead(b"", left)
        left -= len(piece)
        yield piece


def _tls(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if cert_file is not None:
            context.load_cert_chain(cert_file, key_file, password=_no_password)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"gateway.ca_file {ca_file}, cert_file {cert_file} or key_file {key_file} cannot be used ({error}): "
            "they are PEM files, the key without a password"
        ) from error
    return context


def _no_password() -> str:
    return ""  # else OpenSSL asks on the terminal, and a service waits for ever


def _date(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except (ValueError, TypeError, OverflowError):
        return None

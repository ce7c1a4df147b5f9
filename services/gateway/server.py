"""The gateway as a server: opened from tier 1's configuration, and bounds on what one connection may take.

uvicorn bounds an idle connection; it does not bound a request that arrives or is read byte by byte. Here a request's
head must be there within `HEAD_S` and all of it be done within `REQUEST_S`, else the connection is cut.
"""

from __future__ import annotations

import asyncio
import fcntl
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from fednested_lib.errors import ConfigError, StorageError, TransportError
from fednested_lib.log import UPDATES
from services.gateway.admit import Buckets, device_checks
from services.gateway.app import Gateway
from services.gateway.places import Places
from services.gateway.uploads import Uploads
from tier1.federation import Federation

HEAD_S = 10.0
REQUEST_S = 120.0
MAX_CONNECTIONS = 512


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What devices may take: see `fednested gateway --help`."""

    requests_per_s: float = 20.0
    burst: int = 100
    polls_per_s: float = 50.0
    min_poll_s: float = 0.5
    max_payload_bytes: int = 64 << 20


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that cuts connections whose head or whole request takes too long."""

    head_s, request_s = HEAD_S, REQUEST_S
    _bound: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        """Wait for the first head."""
        super().connection_made(transport)
        # asyncio does so only for sockets that name their protocol; uvicorn's do not: 40 ms per answer otherwise.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._limit(self.head_s)

    def data_received(self, data: bytes) -> None:
        """Begin to wait with the first byte of a head, and anew with its last."""
        before = self.cycle
        if self._bound is None:
            self._limit(self.head_s)
        super().data_received(data)
        if self.cycle is not before and not self.cycle.response_complete:
            self._limit(self.request_s)

    def on_response_complete(self) -> None:
        """End the wait, unless the next request has come with this one."""
        before = self.cycle
        self._limit(None)
        super().on_response_complete()
        if self.cycle is not before:
            self._limit(self.request_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the wait."""
        self._limit(None)
        super().connection_lost(exc)

    def _limit(self, seconds: float | None) -> None:
        if self._bound is not None:
            self._bound.cancel()
        self._bound = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)


@contextmanager
def open_gateway(fed: Federation, limits: Limits) -> Iterator[Starlette]:
    """Open the gateway of a federation; its directory `home/gateway` is one process's at a time.

    Raises:
        StorageError: another gateway runs on it, or the file system refuses.
        TransportError: the log does not answer.
    """
    directory, config = fed.home / "gateway", fed.config
    with ExitStack() as stack:
        stack.enter_context(_lock(directory))
        places = Places(directory / "places.db", fed.log)
        stack.callback(places.close)
        places.prune(UPDATES)
        uploads = Uploads(directory / "uploads", fed.payloads, max_bytes=limits.max_payload_bytes)
        yield Gateway(
            fed.log,
            blobs=fed.blobs,
            uploads=uploads,
            places=places,
            devices=config.devices,
            checks=device_checks(config.federation, config.devices, uploads.holds),
            buckets=Buckets(limits.requests_per_s, limits.burst),
            polls_per_s=limits.polls_per_s,
            min_poll_s=limits.min_poll_s,
        ).app()


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / "lock", "wb")  # noqa: SIM115 (held until the end)
    except OSError as error:
        raise StorageError(f"{directory} cannot be opened ({error.strerror}): fix its permissions") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"a gateway already runs on {directory}: stop it, or give it another home") from None
        yield


def make_server(
    app: Starlette,
    *,
    host: str,
    port: int,
    cert_file: Path | None = None,
    key_file: Path | None = None,
    client_ca_file: Path | None = None,
) -> uvicorn.Server:
    """Make the server of an application.

    Args:
        app: see `open_gateway`.
        host: where to listen.
        port: likewise; 0 takes a free one.
        cert_file: certificate chain; with it TLS is spoken.
        key_file: its key.
        client_ca_file: ask every client for a certificate that this one vouches for.

    Raises:
        ConfigError: a certificate cannot be read.
    """
    tls = {"ssl_certfile": cert_file, "ssl_keyfile": key_file} if cert_file else {}
    if client_ca_file is not None:
        if cert_file is None:
            raise ConfigError("--client-ca-file needs --cert-file: without TLS nobody shows a certificate")
        tls |= {"ssl_ca_certs": str(client_ca_file), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        **tls,
    )
    try:
        config.load()
    except OSError as error:
        raise ConfigError(f"--cert-file {cert_file}, --key-file or --client-ca-file cannot be used: {error}") from error
    return uvicorn.Server(config)


def serve(server: uvicorn.Server) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        TransportError: the address is taken.
    """
    config = server.config
    try:
        sockets = [config.bind_socket()]
    except SystemExit:
        raise TransportError(f"cannot listen on {config.host}:{config.port}: choose another --host or --port") from None
    for each in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises what it caught once more when all is done
        signal.signal(each, lambda *_: None)
    server.run(sockets)

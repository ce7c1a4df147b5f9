"""The port through which a device speaks to tier 1, and the choice between its two adapters.

    kafka   records and control events from the broker, payloads and blobs from a file system or object store
    http    all of it through tier 1's gateway: one address, one certificate, uploads and downloads that resume

A device needs little of a log and of the stores, and both adapters pass the same contract tests on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ConfigError
from fednested_lib.log import Record, UpdateLog
from fednested_lib.signing import Signer

if TYPE_CHECKING:
    from fednested_lib.config import Tier2Config


class DeviceLog(Protocol):
    """What a device asks of the log; semantics and errors are those of `UpdateLog`."""

    def append(self, topic: str, *, key: bytes, value: bytes, headers: Mapping[str, bytes]) -> tuple[int, int]:
        """Append an update or telemetry; after a `TransportError` it may or may not be in the log."""

    def read(self, topic: str, ranges: Mapping[int, tuple[int, int]]) -> Iterator[Record]:
        """Yield the control events of half-open ranges, or raise."""

    def watermarks(self, topic: str) -> dict[int, tuple[int, int]]:
        """Return partition → (oldest offset kept, next offset)."""

    def identity(self, topic: str) -> str:
        """Name this topic of this log."""

    def close(self) -> None:
        """Let go of connections."""


class PayloadStore(Protocol):
    """Where a payload above 16 KiB is put before the record that points to it."""

    def put(self, data: bytes) -> str:
        """Store `data` durably and return its digest; doing it again is cheap."""


class BlobSource(Protocol):
    """Where snapshots come from."""

    uri: str

    def get(self, digest: str, *, max_bytes: int | None = None) -> bytes:
        """Return the verified bytes of a blob."""


@dataclass(frozen=True, kw_only=True)
class Transport:
    """The way to tier 1: its log, its drop box for payloads, its snapshots."""

    log: DeviceLog
    payloads: PayloadStore
    source: BlobSource

    @property
    def next_poll_s(self) -> float:
        """How long tier 1 asks to wait before the next look; 0: it has no wish."""
        return getattr(self.log, "next_poll_s", 0.0)

    @property
    def skew_s(self) -> float | None:
        """Tier 1's clock minus ours after the last answer, in seconds; None: it tells no time."""
        return getattr(self.log, "skew_s", None)

    def sweep(self) -> None:
        """Forget partial downloads, after a snapshot is complete."""
        if hasattr(self.source, "sweep"):
            self.source.sweep()

    def close(self) -> None:
        """Let go of connections."""
        self.log.close()


def open_transport(config: Tier2Config, *, log: UpdateLog | None = None) -> Transport:
    """Open the transport that a device's configuration names; nothing is reached before it is used.

    Args:
        config: with absolute paths.
        log: speak to this log instead of the configured broker (tests, single-process runs).

    Raises:
        ConfigError: what the transport needs is missing, or a certificate or key cannot be read.
    """
    if config.transport == "http":
        return _gateway(config)
    if config.blobs_uri is None or config.payloads_uri is None:
        raise ConfigError("transport kafka needs blobs_uri and payloads_uri: set both, or transport: http and gateway")
    if log is None:
        from fednested_lib.kafka_log import KafkaLog

        log = KafkaLog(config.log.servers(), timeout_s=config.log.timeout_s)
    return Transport(log=log, payloads=BlobStore(config.payloads_uri), source=BlobStore(config.blobs_uri))


def _gateway(config: Tier2Config) -> Transport:
    from fednested_lib.gateway_http import GatewayHttp
    from fednested_lib.gateway_log import GatewayLog
    from fednested_lib.gateway_store import GatewayStore

    settings = config.gateway
    if settings is None:
        raise ConfigError("transport http needs gateway: set gateway.url, or transport: kafka")
    gateway = GatewayHttp(
        settings.url,
        client_id=config.client_id,
        signer=Signer.load(config.key),
        timeout_s=settings.timeout_s,
        ca_file=settings.ca_file,
        cert_file=settings.cert_file,
        key_file=settings.key_file,
    )
    store = GatewayStore(gateway, config.home / "sidecar/partials", chunk_bytes=settings.chunk_bytes)
    return Transport(log=GatewayLog(gateway), payloads=store, source=store)

"""Who asks, and what may pass: requests signed by a registered device, records that tier 1 could accept.

The gateway refuses early what admission at tier 1 would refuse anyway (`tier1/versions/admission.py`, which stays the
judge), so that a device hears it at once. Staleness, duplicates and the content of payloads are not its business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from fednested_lib.envelope import HEADER, Envelope, parse_envelope, verify_envelope, verify_update_id
from fednested_lib.errors import EnvelopeError, FednestedError, PayloadError
from fednested_lib.events import SIGNATURE_HEADER as EVENT_SIGNATURE
from fednested_lib.events import TrainingTelemetry, verify_event
from fednested_lib.gateway_wire import CLIENT_HEADER, CLOCK_WINDOW_S, SIGNATURE_HEADER, TIME_HEADER, request_text
from fednested_lib.log import TELEMETRY, UPDATES, Record
from fednested_lib.signing import sha256_hex, verify
from tier1.config import DeviceRecord

# Checks a record of a device; returns the update id by which it is known, None if it has none.
Check = Callable[[Record, str], str | None]


class Unknown(FednestedError):
    """The request is not signed by a registered device."""


class Throttled(FednestedError):
    """A device asks too often; `retry_after_s` from now it may again."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


def identify(headers: Mapping[str, str], method: str, target: str, devices: Mapping[str, DeviceRecord]) -> str:
    """Return the client that signed a request.

    Raises:
        Unknown: nobody who is registered did, or its clock is off.
    """
    client_id, time_s = headers.get(CLIENT_HEADER, ""), headers.get(TIME_HEADER, "")
    device = devices.get(client_id)
    if device is None:
        raise Unknown("this device is not registered: add its client_id and public key to devices in tier1.yaml")
    if not (time_s.isascii() and time_s.isdigit() and len(time_s) < 12):
        raise Unknown(f"{TIME_HEADER} must be seconds since the epoch")
    if abs(int(time_s) - time.time()) > CLOCK_WINDOW_S:
        raise Unknown(
            f"the device's clock must be within {CLOCK_WINDOW_S} s of the server's: see the Date of this answer"
        )
    signed = request_text(method, target, client_id, int(time_s))
    if not verify(device.public_key, headers.get(SIGNATURE_HEADER, ""), signed):
        raise Unknown("the request is not signed by the registered key of this client: compare keys and gateway.url")
    return client_id


class Buckets:
    """A token bucket per client.

    Args:
        per_s: requests that a client may make per second in the long run.
        burst: requests that it may make at once.
    """

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic):
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, client_id: str) -> None:
        """Count one request.

        Raises:
            Throttled: the bucket is empty.
        """
        now = self._clock()
        level, since = self._levels.get(client_id, (float(self._burst), now))
        level = min(self._burst, level + (now - since) * self._per_s)
        if level < 1:
            raise Throttled(f"at most {self._per_s:g} requests per second: wait", (1 - level) / self._per_s)
        self._levels[client_id] = (level - 1, now)

    def active(self, within_s: float) -> int:
        """Return how many clients asked in the last seconds."""
        now = self._clock()
        return sum(now - since <= within_s for _, since in self._levels.values())


def device_checks(
    federation: str, devices: Mapping[str, DeviceRecord], holds: Callable[[str, int], bool]
) -> dict[str, Check]:
    """Return the checks of the topics that devices may append to.

    Args:
        federation: whose updates pass.
        devices: the registered ones.
        holds: tells whether a payload of this digest and size was uploaded.
    """

    def update(record: Record, client_id: str) -> str:
        envelope = _envelope(record)
        _check_origin(record, envelope, client_id)
        _check_federation(envelope.federation, federation)
        device = devices[client_id]
        if envelope.key_epoch != device.key_epoch:
            raise EnvelopeError("wrong_key_epoch", f"key epoch must be {device.key_epoch}, got {envelope.key_epoch}")
        verify_envelope(envelope, device.public_key)
        _check_payload(record, envelope, holds)
        return envelope.update_id

    def telemetry(record: Record, client_id: str) -> None:
        if [name for name, _ in record.headers] != [EVENT_SIGNATURE]:
            raise EnvelopeError("bad_event", f"telemetry must have the one header {EVENT_SIGNATURE}")
        event = verify_event(record.value, dict(record.headers), devices[client_id].public_key)
        if not isinstance(event, TrainingTelemetry):
            raise EnvelopeError("bad_event", f"devices send training telemetry, got {event.event}")
        _check_origin(record, event, client_id)
        _check_federation(event.federation, federation)

    return {UPDATES: update, TELEMETRY: telemetry}


def _envelope(record: Record) -> Envelope:
    if [name for name, _ in record.headers] != [HEADER]:
        raise EnvelopeError("bad_envelope", f"update must have the one header {HEADER}")
    envelope = parse_envelope(record.headers[0][1])
    verify_update_id(envelope)
    return envelope


def _check_origin(record: Record, told: Envelope | TrainingTelemetry, client_id: str) -> None:
    if told.client_id != client_id or record.key != client_id.encode():
        raise EnvelopeError("unknown_client", f"client {client_id} may send in its own name only")


def _check_federation(found: str, federation: str) -> None:
    if found != federation:
        raise EnvelopeError("foreign_federation", f"federation must be {federation}, got {found}: fix tier2.yaml")


def _check_payload(record: Record, envelope: Envelope, holds: Callable[[str, int], bool]) -> None:
    if envelope.payload_uri is not None:
        if record.value:
            raise PayloadError("bad_payload", "an update with payload_uri must have an empty value")
        if not holds(envelope.payload_sha256, envelope.payload_bytes):
            raise PayloadError("missing_payload", f"payload {envelope.payload_sha256} is not here: upload it first")
        return
    if len(record.value) != envelope.payload_bytes or sha256_hex(record.value) != envelope.payload_sha256:
        raise PayloadError(
            "corrupt_payload", f"payload must be the {envelope.payload_bytes} bytes that it is signed for"
        )

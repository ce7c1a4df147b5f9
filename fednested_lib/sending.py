"""The last step of the sidecar: what waits in the outbox goes to the log, and telemetry after it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import structlog

from fednested_lib.config import Tier2Config
from fednested_lib.errors import PayloadError
from fednested_lib.events import TrainingTelemetry, sign_event
from fednested_lib.failpoints import failpoint
from fednested_lib.log import TELEMETRY
from fednested_lib.outbox import Outbox, drain
from fednested_lib.signing import Signer
from fednested_lib.transport import Transport

_log = structlog.get_logger(__name__)


class Sender:
    """Sends for one device.

    Args:
        config: this device.
        transport: the way to tier 1.
        outbox: what waits.
        signer: signs telemetry; updates are signed already.
    """

    def __init__(self, config: Tier2Config, transport: Transport, outbox: Outbox, signer: Signer):
        self.config, self.transport, self.outbox, self.signer = config, transport, outbox, signer
        self._telemetry: list[TrainingTelemetry] = []
        self._jitter = random.Random()

    def tell(self, event: TrainingTelemetry | None) -> None:
        """Keep an event until the updates before it are sent; it is lost with the process."""
        if event is not None:
            self._telemetry.append(event)

    def send(self, sleep: Callable[[float], None], patience_s: float) -> None:
        """Send what waits in the outbox and, when nothing is left, telemetry.

        Args:
            sleep: waits that many seconds.
            patience_s: how long to wait, in all, for back-offs.

        Raises:
            TransportError: telemetry could not be sent; updates that could not stay in the outbox.
        """
        report = drain(
            self.outbox,
            self.transport.log,
            self.transport.payloads,
            now=time.time,
            rng=self._jitter,
            sleep=sleep,
            patience_s=patience_s,
        )
        if report.sent:
            failpoint("sidecar.after_send")
        while self._telemetry and not report.left:
            event = self._telemetry[0]
            headers = sign_event(event, self.signer)
            try:
                key = self.config.client_id.encode()
                self.transport.log.append(TELEMETRY, key=key, value=event.to_bytes(), headers=headers)
            except PayloadError as error:  # nobody will ever take it, and it must not stop the device
                _log.warning("sidecar.telemetry_refused", reason=error.reason)
            self._telemetry.pop(0)

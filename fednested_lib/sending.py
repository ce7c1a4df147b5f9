"""The last step of the sidecar: what waits in the outbox goes to the log, and telemetry after it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from fednested_lib.blobs import BlobStore
from fednested_lib.config import Tier2Config
from fednested_lib.events import TrainingTelemetry, sign_event
from fednested_lib.failpoints import failpoint
from fednested_lib.log import TELEMETRY, UpdateLog
from fednested_lib.outbox import Outbox, drain
from fednested_lib.signing import Signer


class Sender:
    """Sends for one device.

    Args:
        config: this device.
        log: the update log.
        outbox: what waits.
        signer: signs telemetry; updates are signed already.
    """

    def __init__(self, config: Tier2Config, log: UpdateLog, outbox: Outbox, signer: Signer):
        self.config, self.log, self.outbox, self.signer = config, log, outbox, signer
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
            self.log,
            BlobStore(self.config.payloads_uri),
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
            self.log.append(TELEMETRY, key=self.config.client_id.encode(), value=event.to_bytes(), headers=headers)
            self._telemetry.pop(0)

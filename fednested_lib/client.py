"""A device: its sidecar and its trainer, in turn in one process.

`fednested tier2 run-client` runs them as two processes with different rights (`supervisor.py`); here they are one, for
tests, simulations and benchmarks. They talk through the same files and know nothing else of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing

from fednested_lib.config import Tier2Config
from fednested_lib.intake import Intake
from fednested_lib.log import UpdateLog
from fednested_lib.outbox import Outbox
from fednested_lib.sidecar_loop import ClientReport, SidecarLoop
from fednested_lib.stopping import LOOK_S, sigterm, wait
from fednested_lib.trainer_loop import TrainerLoop
from fednested_lib.transport import Transport, open_transport


class Client:
    """One device.

    Args:
        config: with absolute paths.
        transport: the way to tier 1; a log alone stands for it and the stores that the configuration names.
        outbox: this device's own.
        stopped: tells whether to end as soon as possible.
    """

    def __init__(
        self, config: Tier2Config, transport: Transport | UpdateLog, outbox: Outbox, stopped: Callable[[], bool]
    ):
        if not isinstance(transport, Transport):
            transport = open_transport(config, log=transport)
        self.config, self.outbox, self.stopped = config, outbox, stopped
        self.trainer = TrainerLoop(config, stopped)
        self.sidecar = SidecarLoop(config, transport, outbox, Intake.open(config, outbox), stopped)

    def run(self) -> ClientReport:
        """Work until the federation ends, `max_updates` is reached or the process is told to stop."""
        while (report := self.sidecar.turn()) is None:
            if not self.trainer.turn():
                wait(min(LOOK_S, self.config.control.poll_s), until=self.stopped)
        self.trainer.turn()  # lets go of what was taken last
        return report

    def follow(self) -> None:
        """Hear what tier 1 says and fetch the newest model.

        Raises:
            TransportError: the log or the blob store does not answer.
            SnapshotError: the published snapshot is broken at its source.
        """
        self.sidecar.follow()

    def start_job(self) -> None:
        """Write down what the next update is made from."""
        self.trainer.look()
        self.trainer.start()

    def finish_job(self) -> None:
        """Train, spool and release the job; when stopped, leave it for the next start.

        Raises:
            TrainingError: the loss is not finite.
        """
        while self.trainer.state.job is not None and not self.stopped():
            self.trainer.turn()
            self.sidecar.hear_trainer()

    def send(self) -> None:
        """Send what waits in the outbox."""
        self.sidecar.send()


def run(config: Tier2Config, *, log: UpdateLog | None = None) -> ClientReport:
    """Run a device in this process until the federation ends, `max_updates` is reached or SIGTERM arrives.

    Args:
        config: of this device.
        log: the update log; default: what the configuration names.

    Raises:
        DataError: no usable text.
        TransportError: the broker does not answer at the first start.
        SnapshotError: the published snapshot is broken.
        TrainingError: the loss is not finite.
    """
    with ExitStack() as stack:
        outbox = stack.enter_context(Outbox(config.home / "outbox", max_bytes=config.outgoing.outbox_bytes))
        transport = open_transport(config, log=log)
        if log is None:
            stack.enter_context(closing(transport))
        stopped = stack.enter_context(sigterm())
        return Client(config, transport, outbox, stopped).run()

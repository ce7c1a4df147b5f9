"""The two processes of a device, each as the command that systemd or `run-client` starts.

Each holds a lock in its own directory, turns SIGTERM into an orderly end, and says which isolation it finds itself in.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from fednested_lib.config import Tier2Config
from fednested_lib.errors import StorageError
from fednested_lib.isolation import Isolation, observe
from fednested_lib.stopping import sigterm

if TYPE_CHECKING:
    from fednested_lib.sidecar_loop import ClientReport

_log = structlog.get_logger(__name__)


def run_sidecar(config: Tier2Config) -> ClientReport:
    """Run the sidecar until the federation ends, `max_updates` is reached or SIGTERM arrives.

    Raises:
        TransportError: the broker does not answer at the first start.
        SnapshotError: the published snapshot is broken.
        StorageError: the disk is full, or another sidecar runs here.
        ProcessEnded: the process that makes an update anew was killed.
    """
    from fednested_lib.intake_process import IntakeProcess
    from fednested_lib.outbox import Outbox
    from fednested_lib.sidecar_loop import SidecarLoop
    from fednested_lib.transport import open_transport

    with ExitStack() as stack:
        stopped = stack.enter_context(sigterm())
        outbox = stack.enter_context(Outbox(config.home / "outbox", max_bytes=config.outgoing.outbox_bytes))
        intake = IntakeProcess(config, outbox)
        transport = stack.enter_context(closing(open_transport(config)))
        return SidecarLoop(config, transport, outbox, intake, stopped).run()


def run_trainer(config: Tier2Config) -> None:
    """Run the trainer until SIGTERM arrives.

    Raises:
        IsolationError: this process is kept apart less than isolation.require demands.
        DataError: no usable text.
        PayloadError: too many updates in a row were refused.
        SnapshotError: a snapshot does not load.
        TrainingError: the loss is not finite.
    """
    from fednested_lib.trainer_loop import TrainerLoop

    with ExitStack() as stack:
        stopped = stack.enter_context(sigterm())
        found = observed(config)
        _log.info("trainer.isolation", reached=found.level, **vars(found))
        found.require(config.isolation.require)
        stack.enter_context(_alone(config.home / "trainer"))
        TrainerLoop(config, stopped).run()


def observed(config: Tier2Config) -> Isolation:
    """Return what this process, as trainer, is kept from; no room of the sidecar, nor the key, may be its own."""
    rooms = [config.home / "sidecar", config.home / "outbox", config.key]
    users = os.getuid() != 0 and not any(_is_mine(path) for path in rooms)
    return observe(users=users)


def _is_mine(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid() or os.access(path, os.R_OK)
    except PermissionError:
        return False
    except OSError:  # not there: nothing says whose it would be
        return True


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a lock in a directory.

    Raises:
        StorageError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"{directory} is in use by another trainer: stop it, or give this device another home"
            ) from None
        yield

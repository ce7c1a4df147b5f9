"""The intake in a short-lived process of its own, so that the sidecar at rest is small.

    sidecar ─ fork ─ policy, ledger, audit log, numbers: check, re-make, sign, charge, record ─ pipe ─ sidecar: outbox

Making an update anew takes numpy, the policy, the ledger and the audit log: memory that is needed for a moment every
few minutes. The child has the rights of the sidecar and no more, opens what it needs itself, talks to nobody, and hands
the finished update back for the outbox. It is done again whenever it did not come that far (`Sidecar.release`), so a
child that is killed costs nothing; it takes the sidecar with it, for whoever starts that one again to see.

Forked, not started anew: the contract's modules are loaded already, and the child touches nothing of the transport.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
import traceback
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NoReturn

from fednested_lib.config import Tier2Config
from fednested_lib.errors import FednestedError, ProcessEnded, error_of
from fednested_lib.events import TrainingTelemetry
from fednested_lib.isolation import die_with
from fednested_lib.orders import Model
from fednested_lib.outbox import Outbox
from fednested_lib.signing import canonical_json

if TYPE_CHECKING:
    from fednested_lib.intake import Intake

PATIENCE_S = 600.0  # for one update; the largest that a policy may list takes seconds
_CHUNK_BYTES = 1 << 16
_SIZE_BYTES = 8  # of the header's length, before it


class IntakeProcess:
    """Takes spooled updates of one device, each in a process of its own; at rest it holds no policy and no numbers.

    Args:
        config: with absolute paths.
        outbox: what is made goes into it.

    Raises:
        ConfigError: the policy is missing, unsigned, altered, older than one obeyed before, or does not fit.
        AuditError: the audit log was altered.
        StorageError: the file system refuses.
        ProcessEnded: the process was killed.
    """

    def __init__(self, config: Tier2Config, outbox: Outbox):
        self._config, self._outbox = config, outbox
        self._apart(self._check)

    def take(self, sequence: int, models: Iterable[Model]) -> TrainingTelemetry | None:
        """Put one update into the outbox, as `Intake.take` does.

        Raises:
            ProcessEnded: the process was killed, or hung; the update is still spooled.
        """
        return self._apart(lambda handed: self._intake(handed).take(sequence, models))

    def _check(self, handed: _Handed) -> None:
        self._intake(handed)

    def _intake(self, handed: _Handed) -> Intake:
        from fednested_lib.intake import Intake  # and with it numpy

        return Intake.open(self._config, handed)

    def _apart(self, call: Callable[[_Handed], TrainingTelemetry | None]) -> TrainingTelemetry | None:
        document, payload = _in_child(call)
        if "error" in document:
            raise error_of(document["error"])
        item = document["item"]
        if item is not None:
            encoded = {name: b64decode(item[name]) for name in ("key", "envelope")}
            self._outbox.put(**item | encoded, payload=payload)
        event = document["told"]
        return None if event is None else TrainingTelemetry.model_validate_json(event)


class _Handed:
    """Stands for the outbox in the child: keeps the one update that is to go there."""

    def __init__(self) -> None:
        self.item: dict | None = None
        self.payload = b""

    def put(self, *, payload: bytes, key: bytes, envelope: bytes, **rest: object) -> None:
        """Keep it."""
        self.item = {**rest, "key": b64encode(key).decode(), "envelope": b64encode(envelope).decode()}
        self.payload = payload


def _in_child(call: Callable[[_Handed], TrainingTelemetry | None]) -> tuple[dict, bytes]:
    """Fork, call, and return what the child said, with the payload that it made.

    Raises:
        ProcessEnded: it could not be started, was killed, hung, or ended without a word.
    """
    parent = os.getpid()
    try:
        answer, end = os.pipe()
        child = os.fork()
    except OSError as error:
        raise ProcessEnded(_ended(f"cannot be started ({error.strerror})"), 1) from error
    if child == 0:
        os.close(answer)
        _work(call, end, parent)
    os.close(end)
    with open(answer, "rb") as pipe:
        said = _read_all(pipe.fileno(), time.monotonic() + PATIENCE_S)
    if said is None:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if said is None or status != 0:
        how = f"did not end within {PATIENCE_S:g} s" if said is None else _how(status)
        raise ProcessEnded(_ended(how), 128 - status if status < 0 else 1)
    size = int.from_bytes(said[:_SIZE_BYTES], "big")
    return json.loads(said[_SIZE_BYTES : _SIZE_BYTES + size]), said[_SIZE_BYTES + size :]


def _work(call: Callable[[_Handed], TrainingTelemetry | None], end: int, parent: int) -> NoReturn:
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):  # an update that is being made is finished
            signal.signal(number, signal.SIG_IGN)
        die_with(parent, signal.SIGKILL)
        handed = _Handed()
        try:
            event = call(handed)
            document = {"item": handed.item, "told": None if event is None else event.to_bytes().decode()}
        except FednestedError as error:
            document = {"error": error.to_document()}
        header = canonical_json(document)
        with open(end, "wb") as pipe:
            pipe.write(len(header).to_bytes(_SIZE_BYTES, "big") + header + handed.payload)
        code = 0
    except BaseException:  # whatever it is, this copy of the sidecar must not go on as a second one
        traceback.print_exc()
    finally:
        os._exit(code)


def _read_all(descriptor: int, deadline: float) -> bytes | None:
    """Return all that is written until the other end closes, None if that is not before the deadline."""
    parts = []
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(descriptor, _CHUNK_BYTES)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with {status}, see above"


def _ended(how: str) -> str:
    return f"the process that makes an update anew {how}; the update is still spooled, nothing is lost: start again"

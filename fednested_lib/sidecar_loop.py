"""The sidecar's loop: the one process of a device that talks to anybody, and the one that sees no data.

    follow control topic → fetch snapshot → publish orders → take what was spooled → release → send

It owns the key, the policy, the outbox and what lies in `sidecar/`, `orders/` and `blobs/`. It has the trainer's files
for nothing but what they say: a spooled update is parsed strictly and made anew (`sidecar.release`), one that cannot be
is refused by name, and the trainer makes it again. A number is taken when the outbox has it; the outbox, the state file
and the orders each remember the highest, so that losing one of them uses none twice.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import structlog
from pydantic import BaseModel, ConfigDict, Field

from fednested_lib.blobs import BlobStore
from fednested_lib.config import Tier2Config
from fednested_lib.control import ControlTopic
from fednested_lib.envelope import Digest
from fednested_lib.errors import OutboxFull, PayloadError, PolicyWait, SnapshotError, StorageError, TransportError
from fednested_lib.events import (
    Event,
    FederationEnd,
    ModelAvailable,
    ResendUnsettled,
    UpdatesSettled,
)
from fednested_lib.failpoints import failpoint
from fednested_lib.held_models import (
    damaged_manifests,
    fetch_model,
    prune_models,
    repair_model,
    still_needed,
    with_newest,
    without_unloadable,
)
from fednested_lib.orders import (
    KEPT,
    Model,
    Orders,
    Refusal,
    Sequence,
    Status,
    orders_path,
    read_note,
    status_path,
    write_note,
)
from fednested_lib.outbox import Outbox
from fednested_lib.resend import Unnamed, queue_all
from fednested_lib.sending import Sender
from fednested_lib.signing import Signer
from fednested_lib.spool import Spool
from fednested_lib.state import load_state, save_state
from fednested_lib.stopping import LOOK_S, wait
from fednested_lib.transport import Transport

if TYPE_CHECKING:
    from fednested_lib.intake import Intake
    from fednested_lib.intake_process import IntakeProcess

FAREWELL_S = 20.0
LOOK_AGAIN_S = 3600.0  # at an update that the policy lets wait
MAX_GAP = 1 << 20  # of numbers that a trainer may leave out: it may remember what a sidecar forgot, not use them up

_log = structlog.get_logger(__name__)


class SidecarState(BaseModel):
    """What the sidecar remembers in `sidecar/state.json`: the next free number and the snapshots that are here.

    The last of `models` is the one to train on. `loaded` is the snapshot that the trainer loaded last, `unloadable` the
    one that it could not load, which is not tried again. `resent_seq` is the position of the chain entry for which
    everything was last sent again.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    next_sequence: Sequence = 0
    models: Annotated[list[Model], Field(max_length=KEPT)] = []
    loaded: Digest | None = None
    unloadable: Model | None = None
    resent_seq: int = Field(default=0, ge=0)


@dataclass(frozen=True, kw_only=True)
class ClientReport:
    """Why a device stopped, how many updates it made since it started, and how many wait in its outbox."""

    reason: str
    updates: int
    waiting: int

    def __str__(self) -> str:
        left = f", {self.waiting} not sent yet: start again to send" if self.waiting else ""
        return f"{self.reason} ({self.updates} updates made{left})"


class SidecarLoop:
    """The sidecar of one device.

    Args:
        config: with absolute paths.
        transport: the way to tier 1.
        outbox: this device's own.
        intake: takes what was spooled, here or in a process of its own.
        stopped: tells whether to end as soon as possible.
    """

    def __init__(
        self,
        config: Tier2Config,
        transport: Transport,
        outbox: Outbox,
        intake: Intake | IntakeProcess,
        stopped: Callable[[], bool],
    ):
        self.config, self.transport, self.outbox, self.stopped = config, transport, outbox, stopped
        self.signer = Signer.load(config.key)
        self.blobs = BlobStore(config.home / "blobs")
        self.source = transport.source
        self.spool = Spool(config.home / "spool")
        self.intake = intake
        self.sender = Sender(config, transport, outbox, self.signer)
        self.topic = ControlTopic(transport.log, federation=config.federation, public_key=config.control.public_key)
        self.updates = 0
        self._held = False  # by the policy: an update that waits in the spool
        self.ended: FederationEnd | None = None
        self._announced: ModelAvailable | None = None
        self._broken: str | None = None  # a snapshot that is not whole at its source
        self._unnamed = Unnamed(outbox, config.control.resend_after_s)
        self._due: tuple[int, float] | None = None  # the update that waits for its pace: number, until when
        self._next_look = 0.0
        self.state = load_state(config.home / "sidecar/state.json", SidecarState)
        self.orders = self._withdraw()
        last = outbox.last_sequence()
        free = max(self.state.next_sequence, self.orders.next_sequence, -1 if last is None else last + 1)
        self.state = self.state.model_copy(update={"next_sequence": free})

    def _withdraw(self) -> Orders:
        """Take old orders away: what they say of model and end may be over, and the trainer is to wait for new ones."""
        path = orders_path(self.config.home)
        try:
            old = read_note(path, Orders)
        except StorageError:
            old = None
        path.unlink(missing_ok=True)
        kept = {"repairs": old.repairs, "next_sequence": old.next_sequence} if old else {}
        return Orders(start_secret=self.signer.secret("start").hex(), **kept)

    def run(self) -> ClientReport:
        """Work until the federation ends, `max_updates` is reached or the process is told to stop."""
        while (report := self.turn()) is None:
            wait(min(LOOK_S, self.config.control.poll_s), until=self.stopped)
        return report

    def turn(self) -> ClientReport | None:
        """Do what there is to do now; tells when that was all that there ever will be."""
        if time.monotonic() >= self._next_look:
            self.online(self.follow)
            self._next_look = time.monotonic() + max(self.config.control.poll_s, self.transport.next_poll_s)
        status = self.hear_trainer()
        self.online(self.send)
        reason = self._reason_to_stop(status)
        if reason is None:
            return None
        if reason != "stopped":
            self.online(lambda: self.send(patience_s=FAREWELL_S))
        return ClientReport(reason=reason, updates=self.updates, waiting=len(self.outbox.pending()))

    def hear_trainer(self) -> Status | None:
        """Do what the trainer's files ask for: repair a snapshot, let old ones go, take updates; return its status."""
        status = self._status()
        self.online(lambda: self._repair(status))
        self._roll_back(status)
        self._let_go(status)
        self.take(status)
        return status

    def follow(self) -> None:
        """Read the control topic to its end, fetch the newest model, and publish orders.

        Raises:
            TransportError: the log or the blob store does not answer.
            SnapshotError: the published snapshot is broken at its source, and there is no other here.
        """
        try:
            for event in self.topic.news():
                self._obey(event)
            self._unnamed.queue(self._newest_seq())
            event = self._announced
            known = (_name(self.model), _name(self.state.unloadable), self._broken)
            if event is not None and event.snapshot not in known:
                self._switch(event)
        finally:
            self.publish()

    def _switch(self, event: ModelAvailable) -> None:
        try:
            model = fetch_model(event, self.source, self.blobs)
        except SnapshotError as error:
            if self.model is None:
                raise
            self._broken = event.snapshot  # until it is announced again: the model that is here goes on
            _log.error("sidecar.snapshot_broken", version=event.version, reason=error.reason, problem=str(error))
            return
        failpoint("sidecar.after_fetch")
        status = self._status()
        needed = (status.snapshot if status else None, self.state.loaded)
        # The switch is this one rename; until then the old snapshot is the device's model.
        self._save(models=with_newest(self.state.models, model, needed), unloadable=None)
        self.transport.sweep()

    @property
    def model(self) -> Model | None:
        """The snapshot to train on: the newest that is here, unless it does not load."""
        return self.state.models[-1] if self.state.models else None

    def publish(self, **changes: object) -> None:
        """Write orders if they changed."""
        changes |= {
            "model": self.model,
            "kept": [model.snapshot for model in self.state.models],
            "next_sequence": self.state.next_sequence,
            "end": self.ended.reason if self.ended else None,
        }
        orders, path = self.orders.model_copy(update=changes), orders_path(self.config.home)
        if orders != self.orders or not path.exists():
            write_note(path, orders)
            failpoint("sidecar.after_orders")
            self.orders = orders

    def _obey(self, event: Event) -> None:
        if isinstance(event, UpdatesSettled):
            self.outbox.confirm(event.update_ids)
        elif isinstance(event, ResendUnsettled):
            if event.chain_seq > self.state.resent_seq:  # once per event; a crash between only repeats it
                queue_all(self.outbox, event.chain_seq)
                failpoint("sidecar.after_send_again")
                self._save(resent_seq=event.chain_seq)
        elif isinstance(event, FederationEnd) and self._is_current(event):
            self.ended = event
        elif isinstance(event, ModelAvailable) and self._is_current(event):
            self._announced, self.ended, self._broken = event, None, None

    def _is_current(self, event: FederationEnd | ModelAvailable) -> bool:
        """Tell whether an event is as new as the model held or announced; an older one was sent again by somebody."""
        newest = self._newest_seq()
        if event.chain_seq < newest:
            _log.warning("control.ignored", reason="older_than_held", chain_seq=event.chain_seq, held=newest)
        return event.chain_seq >= newest

    def _newest_seq(self) -> int:
        known = (self._announced, self.model, self.state.unloadable)
        return max((each.chain_seq for each in known if each), default=0)

    def _status(self) -> Status | None:
        """Read what the trainer says of itself; what cannot be read says nothing."""
        try:
            return read_note(status_path(self.config.home), Status)
        except StorageError as error:
            _log.warning("sidecar.status_ignored", problem=str(error))
            return None

    def _repair(self, status: Status | None) -> None:
        """Fetch the damaged blobs of a snapshot that the trainer could not load under the present orders."""
        if status is None or status.damaged is None or not self._up_to_date(status):
            return
        for model in self.state.models:
            if model.snapshot == status.damaged:
                repair_model(model, self.source, self.blobs)
                self.publish(repairs=self.orders.repairs + 1)

    def _roll_back(self, status: Status | None) -> None:
        """Go back to the snapshot that loaded before, if the trainer cannot load the one of the present orders."""
        if status is None or status.unloadable is None or not self._up_to_date(status):
            return
        bad = next((model for model in self.state.models if model.snapshot == status.unloadable), None)
        left = without_unloadable(self.state.models, status.unloadable, self.state.loaded)
        if bad is None or not left:
            return
        self._save(models=left, unloadable=bad if bad == self.model else self.state.unloadable)
        failpoint("sidecar.after_roll_back")
        self.publish()
        prune_models(left, self.source, self.blobs)
        _log.error("sidecar.rolled_back", version=bad.version, to_version=left[-1].version)

    def _let_go(self, status: Status | None) -> None:
        """Delete the snapshots that the trainer, who has seen the present orders, does not need."""
        if status is None or not self._up_to_date(status):
            return
        held = {model.snapshot for model in self.state.models}
        if status.loaded in held and status.loaded != self.state.loaded:
            self._save(loaded=status.loaded)
        if len(held) < 2:
            return
        needed = still_needed(self.state.models, status.snapshot, self.state.loaded)
        if len(needed) < len(held):
            self._save(models=needed)
            self.publish()
            prune_models(needed, self.source, self.blobs)

    def _up_to_date(self, status: Status) -> bool:
        return status.orders == self.orders.digest

    def take(self, status: Status | None) -> None:
        """Release what was spooled, the smallest number first; an update that cannot leave is refused by name.

        Raises:
            SnapshotError: the manifest of a held snapshot is damaged, and broken at its source.
            StorageError: the disk is full.
        """
        for sequence in self.spool.waiting():
            if not 0 <= sequence - self.state.next_sequence <= MAX_GAP:
                continue  # taken already, or a number that nobody can have reached
            refused = self.orders.refused
            if refused and refused.sequence == sequence and not (status and self._up_to_date(status)):
                continue  # the trainer has not looked yet
            if not self._is_due(sequence):
                return
            try:
                self._take(sequence)
            except PayloadError as error:
                self._held = False
                _log.error("sidecar.refused", sequence=sequence, reason=error.reason, problem=str(error))
                self.publish(refused=Refusal(id=uuid.uuid4().hex, sequence=sequence, reason=error.reason))
                return
            except OutboxFull as error:
                _log.warning("sidecar.backlog", problem=str(error))
                self._due = (sequence, time.monotonic() + self.config.control.poll_s)
                self.publish(pause="backlog")
                return
            except PolicyWait as wait:
                self._hold(sequence, wait)
                return
            except SnapshotError:  # of the update's base, here: the trainer, who has loaded it, will not notice
                if not self._mend_manifests():
                    raise
                return

    def _mend_manifests(self) -> bool:
        """Fetch the damaged ones anew; tells whether there were any."""
        damaged = damaged_manifests(self.state.models, self.blobs)
        self.online(lambda: [self.blobs.put(self.source.get(each)) for each in damaged])
        return bool(damaged)

    def _hold(self, sequence: int, wait: PolicyWait) -> None:
        """Keep an update until the policy lets it leave; look again in an hour at most, whatever the clock did."""
        left_s = LOOK_AGAIN_S if wait.not_before_s is None else wait.not_before_s - time.time()
        self._due = (sequence, time.monotonic() + min(max(left_s, 0.0), LOOK_AGAIN_S))
        self._held = True
        self.publish(pause="policy")

    def _is_due(self, sequence: int) -> bool:
        """Tell whether an update has waited for its pace, and for room in the outbox, long enough."""
        now = time.monotonic()
        if self._due is None or self._due[0] != sequence:
            self._due = (sequence, now + self.config.training.pace_s)
        return now >= self._due[1] or (self.ended is not None and not self._held)

    def _take(self, sequence: int) -> None:
        taken = self.intake.take(sequence, self.state.models)
        failpoint("sidecar.after_release")
        if sequence > self.state.next_sequence:
            _log.warning("sidecar.gap", sequence=sequence, expected=self.state.next_sequence)
        self._save(next_sequence=sequence + 1)
        self.updates += 1
        self._held = False
        self.sender.tell(taken)
        self.publish(pause=None)

    def send(self, patience_s: float = 0.0) -> None:
        """Send what waits in the outbox and, when nothing is left, telemetry.

        Raises:
            TransportError: telemetry could not be sent; updates that could not stay in the outbox.
        """
        self.sender.send(self._sleep, 0.0 if self.stopped() else patience_s)

    def _sleep(self, seconds: float) -> None:
        """Wait, and follow the control topic meanwhile: what is settled there need not be sent."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.stopped():
            wait(min(left, self.config.control.poll_s), until=self.stopped)
            self.online(self.follow)

    def _reason_to_stop(self, status: Status | None) -> str | None:
        most = self.config.training.max_updates
        if self.stopped():
            return "stopped"
        if self.ended is not None:
            finished = status is not None and self._up_to_date(status) and status.job is None
            done = finished or self._held or self.ended.reason == "cancelled"
            return f"federation {self.ended.reason}" if done else None
        if most is not None and self.state.next_sequence >= most:
            return f"training.max_updates = {most} reached"
        return None

    def online(self, call: Callable[[], object]) -> None:
        """Do something that needs the network; without it go on, except at the very first start.

        Raises:
            TransportError: there is no model yet, so there is nothing to do without tier 1.
        """
        try:
            call()
        except TransportError as error:
            if self.model is None:
                raise
            _log.warning("sidecar.offline", problem=str(error))

    def _save(self, **changes: object) -> None:
        state = self.state.model_copy(update=changes)
        save_state(self.config.home / "sidecar/state.json", state)
        self.state = state


def _name(model: Model | None) -> str | None:
    return model.snapshot if model else None

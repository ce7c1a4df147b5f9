"""The trainer's loop: the one process of a device that sees data, and the one that talks to nobody.

    read orders → settle the last job → begin the next one → train from B = 0 → spool

It has no key, no credential and no network. It owns what lies in `spool/` and `trainer/`, and reads orders, blobs and
its text. A job (sequence number, base, window of the device's own rows) is written down *before* training, and
everything after it is a function of it: a trainer that is killed anywhere makes the same update again. An update stays
in the spool until orders say that its number is taken. One that the sidecar refuses is made again, a second time from
the next rows; after eight in a row the trainer stops and says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
from pydantic import BaseModel, ConfigDict, Field

from fednested_lib.blobs import BlobStore
from fednested_lib.config import Tier2Config
from fednested_lib.envelope import Digest
from fednested_lib.errors import PayloadError, SnapshotError
from fednested_lib.failpoints import failpoint
from fednested_lib.local_update import Interrupted, Job, LocalTrainer, job_seed
from fednested_lib.orders import Orders, Refusal, Sequence, Status, orders_path, read_note, status_path, write_note
from fednested_lib.schedule import Gatekeeper
from fednested_lib.spool import Spool
from fednested_lib.state import load_state, save_state
from fednested_lib.stopping import LOOK_S, wait
from fednested_lib.text import require_text

MAX_REFUSED = 8  # updates in a row; more would only burn energy

_log = structlog.get_logger(__name__)


class TrainerState(BaseModel):
    """What the trainer remembers in `trainer/state.json`: its number, its place in its text, its job.

    `updates_on_model` counts the updates made from the snapshot `counted_on`; `refusal` is the last one it acted on.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    next_sequence: Sequence = 0
    next_row: int = Field(default=0, ge=0)
    job: Job | None = None
    counted_on: Digest | None = None
    updates_on_model: int = Field(default=0, ge=0)
    refusal: str | None = None
    refused: int = Field(default=0, ge=0)


class TrainerLoop:
    """The trainer of one device.

    Args:
        config: with absolute paths; key, broker and stores in it are not this process's business.
        stopped: tells whether to end as soon as possible.
        gatekeeper: says whether it may train now, before every update and every step; default: the configured schedule.

    Raises:
        DataError: the device has no text.
    """

    def __init__(self, config: Tier2Config, stopped: Callable[[], bool], gatekeeper: Gatekeeper | None = None):
        require_text(config.data)  # a device without text fails here, not after a download
        self.config, self.stopped = config, stopped
        self.gatekeeper = gatekeeper or Gatekeeper(config.schedule, config.home / "trainer/energy.json")
        self.spool = Spool(config.home / "spool")
        self.local = LocalTrainer(config, BlobStore(config.home / "blobs"), self.spool)
        self.state = load_state(config.home / "trainer/state.json", TrainerState)
        self.orders: Orders | None = None
        self._told: Status | None = None
        self._damaged: tuple[str, int] | None = None  # a snapshot that would not load, and the repairs until then
        self._unloadable: str | None = None  # one that would not load after its repair either
        self._waits_for: str | None = None
        self._next_look = 0.0
        self.spool.keep_only(self.state.job.sequence if self.state.job else None)

    def run(self) -> None:
        """Work until the process is told to stop; whether the federation is over, orders say."""
        while not self.stopped():
            if not self.turn():
                wait(min(LOOK_S, self.config.control.poll_s), until=self.stopped)

    def turn(self) -> bool:
        """Do the next thing that is to do; tells whether there was one.

        Raises:
            PayloadError: too many updates in a row were refused.
            SnapshotError: a snapshot does not load, though it was fetched anew.
            TrainingError: the loss is not finite.
        """
        self.look()
        if self.orders is None:
            return False
        moved = self.settle() or self.begin()
        self._tell()
        moved = moved or self.make()
        self._tell()
        return moved

    def look(self) -> None:
        """Read the orders; none means that the sidecar has not started yet."""
        self.orders = read_note(orders_path(self.config.home), Orders)

    def settle(self) -> bool:
        """Tick the job off when its number is taken, or do what its refusal asks for."""
        job, orders = self.state.job, self.orders
        if job is None:
            return False
        if orders.next_sequence > job.sequence:
            self._finish(job)
            return True
        refusal = orders.refused
        if refusal is not None and refusal.sequence == job.sequence and refusal.id != self.state.refusal:
            self._make_again(job, refusal)
            return True
        if job.model.snapshot not in orders.kept and not self.spool.has(job.sequence):
            _log.warning("trainer.abandoned", sequence=job.sequence, version=job.model.version)
            self._save(job=None)
            return True
        return False

    def _finish(self, job: Job) -> None:
        self.spool.remove(job.sequence)
        failpoint("trainer.after_removal")
        before = self.state.updates_on_model if self.state.counted_on == job.model.snapshot else 0
        self._save(
            job=None,
            next_sequence=job.sequence + 1,
            next_row=job.first_row + job.n_rows,
            counted_on=job.model.snapshot,
            updates_on_model=before + 1,
            refused=0,
        )

    def _make_again(self, job: Job, refusal: Refusal) -> None:
        self.spool.remove(job.sequence)
        refused = self.state.refused + 1
        if refused % 2 == 0:  # the same bytes twice: these rows are at fault, or nothing will help
            job = job.model_copy(update={"first_row": job.first_row + job.n_rows})
        self._save(job=job, refusal=refusal.id, refused=refused)
        _log.warning("trainer.refused", sequence=job.sequence, reason=refusal.reason, first_row=job.first_row)
        if refused >= MAX_REFUSED:
            raise PayloadError(
                refusal.reason,
                f"{refused} updates in a row, at most {MAX_REFUSED}, were refused by the sidecar for "
                f"{refusal.reason}: see sidecar.refused in its log, fix the cause and start again",
            )

    def begin(self) -> bool:
        """Begin the next update, if one is wanted and allowed."""
        how, state, orders = self.config.training, self.state, self.orders
        if (
            state.job is not None
            or orders.model is None
            or orders.start_secret is None  # orders of an older version: the sidecar writes new ones when it starts
            or orders.end is not None
            or orders.pause is not None
            or (how.max_updates is not None and self._next_sequence() >= how.max_updates)
            or (state.counted_on == orders.model.snapshot and state.updates_on_model >= how.updates_per_base)
            or not self._may_train()
        ):
            return False
        self.start()
        return True

    def start(self) -> None:
        """Choose and write down what the next update is made from."""
        how = self.config.training
        sequence = self._next_sequence()
        job = Job(
            sequence=sequence,
            seed=job_seed(self.config, self.orders.start_secret, sequence),
            model=self.orders.model,
            first_row=self.state.next_row,
            n_rows=how.steps * how.batch_size,
        )
        self._save(job=job)
        failpoint("trainer.after_job")

    def _next_sequence(self) -> int:
        return max(self.state.next_sequence, self.orders.next_sequence)

    def make(self) -> bool:
        """Train the job and spool the update, if that was not done; when interrupted, leave it for the next turn."""
        job = self.state.job
        if job is None or self.spool.has(job.sequence) or self.orders.end == "cancelled" or not self._may_train():
            return False
        if self._damaged == (job.model.snapshot, self.orders.repairs) or self._unloadable == job.model.snapshot:
            return False  # the sidecar has not repaired it yet, or not gone back to another
        try:
            self.local.train(job, self._interrupted)
        except Interrupted:
            return False
        except SnapshotError as error:
            if self._damaged is not None and self._damaged[0] == job.model.snapshot:
                if len(self.orders.kept) < 2:  # there is none to go back to
                    raise
                _log.error("trainer.snapshot_unloadable", version=job.model.version, reason=error.reason)
                self._damaged, self._unloadable = None, job.model.snapshot
                return True
            _log.warning("trainer.snapshot_damaged", version=job.model.version, reason=error.reason)
            self._damaged = (job.model.snapshot, self.orders.repairs)
            return True
        self._damaged = None
        return True

    def _may_train(self) -> bool:
        return not self.stopped() and self._goes_on(self.gatekeeper.forbids())

    def _goes_on(self, reason: str | None) -> bool:
        if reason != self._waits_for:
            _log.info("trainer.waits" if reason else "trainer.goes_on", reason=reason or self._waits_for)
            self._waits_for = reason
        return reason is None

    def _interrupted(self) -> bool:
        """Tell, after a step, whether to leave the job: told to end, not allowed to go on, federation cancelled."""
        if self.stopped() or not self._goes_on(self.gatekeeper.forbids_next_step()):
            return True
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + LOOK_S
        orders = read_note(orders_path(self.config.home), Orders)
        return orders is not None and orders.end == "cancelled"

    def _tell(self) -> None:
        job = self.state.job
        status = Status(
            orders=self.orders.digest,
            job=job.sequence if job else None,
            snapshot=job.model.snapshot if job else None,
            damaged=self._damaged[0] if self._damaged else None,
            unloadable=self._unloadable,
            loaded=self.local.loaded,
        )
        if status != self._told:
            write_note(status_path(self.config.home), status)
            failpoint("trainer.after_status")
            self._told = status

    def _save(self, **changes: object) -> None:
        state = self.state.model_copy(update=changes)
        save_state(self.config.home / "trainer/state.json", state)
        self.state = state

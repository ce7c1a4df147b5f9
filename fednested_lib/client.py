"""The device loop: fetch the newest model, train on the device's own text, hand over an update, again.

    follow control topic → fetch snapshot → choose job → train from B = 0 → spool → release → send

A job (sequence number, base, window of the device's own rows) is written down *before* training, and everything after
it is a function of it: a device that is killed anywhere makes the same update again and emits the same bytes, and what
is in the outbox is never made twice. A sent delta is never part of a later one: every update starts a fresh adapter on
the frozen snapshot.

Waits are short slices, so SIGTERM ends the loop cleanly; unfinished work is finished at the next start. A broker or
store that does not answer is waited for, except at the very first start, when there is nothing to do without it.
"""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fednested_lib.blobs import BlobStore, write_durable
from fednested_lib.config import Tier2Config
from fednested_lib.envelope import Envelope
from fednested_lib.errors import (
    ContractError,
    LogError,
    PayloadError,
    PolicyWait,
    SnapshotError,
    StorageError,
    TransportError,
)
from fednested_lib.events import (
    MAX_EXPERTS,
    MAX_LAYERS,
    FederationEnd,
    ModelAvailable,
    ResendUnsettled,
    TrainingTelemetry,
    UpdatesSettled,
    sign_event,
    verify_event,
)
from fednested_lib.failpoints import failpoint
from fednested_lib.local_update import Interrupted, Job, LocalReport, LocalTrainer, Model
from fednested_lib.log import CONTROL, TELEMETRY, UpdateLog
from fednested_lib.outbox import Outbox, drain
from fednested_lib.sidecar import open_sidecar
from fednested_lib.signing import Signer, canonical_json
from fednested_lib.snapshot import SnapshotManifest, fetch, prune
from fednested_lib.spool import Spool
from fednested_lib.text import require_text

_SLICE_S = 0.1
_FAREWELL_S = 20.0

_log = structlog.get_logger(__name__)


class State(BaseModel):
    """What a device remembers in `state.json`: its number, its place in its text, its model, its job.

    `resent_seq` is the position of the chain entry for which it last sent everything again.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    next_sequence: int = Field(default=0, ge=0)
    next_row: int = Field(default=0, ge=0)
    model: Model | None = None
    updates_on_model: int = Field(default=0, ge=0)
    job: Job | None = None
    resent_seq: int = Field(default=0, ge=0)


def load_state(path: Path) -> State:
    """Read the state file; a device without one starts at sequence 0.

    Raises:
        StorageError: the file cannot be read or was altered.
    """
    try:
        return State.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return State()
    except (OSError, ValidationError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not what this version writes"
        raise StorageError(
            f"state file {path} is unusable ({problem}): move it away; numbers go on from the outbox"
        ) from None


@dataclass(frozen=True, kw_only=True)
class ClientReport:
    """Why a device stopped, how many updates it made since it started, and how many wait in its outbox."""

    reason: str
    updates: int
    waiting: int

    def __str__(self) -> str:
        left = f", {self.waiting} not sent yet: start again to send" if self.waiting else ""
        return f"{self.reason} ({self.updates} updates made{left})"


class Client:
    """One device.

    Args:
        config: with absolute paths.
        log: the update log.
        outbox: this device's own.
        stopped: tells whether to end as soon as possible.
    """

    def __init__(self, config: Tier2Config, log: UpdateLog, outbox: Outbox, stopped: Callable[[], bool]):
        require_text(config.data)  # a device without text fails here, not after a download
        self.config, self.log, self.outbox, self.stopped = config, log, outbox, stopped
        self.signer = Signer.load(config.key)
        self.sidecar = open_sidecar(config, outbox, now=time.time())
        self.blobs = BlobStore(config.home / "blobs")
        self.source = BlobStore(config.blobs_uri)
        self.spool = Spool(config.home / "spool")
        self.trainer = LocalTrainer(config, self.blobs, self.spool)
        self.state = load_state(config.home / "state.json")
        self._control_log = ""
        self._control_offset = 0
        self._control_digest = ""  # of the record before the offset
        self._announced: ModelAvailable | None = None
        self._ended: FederationEnd | None = None
        self._unnamed: dict[str, tuple[float, int]] = {}  # update id → when it was first seen so, and on which chain
        self._telemetry: list[TrainingTelemetry] = []
        self._jitter = random.Random()
        self._updates = 0
        self._not_before_s = 0.0  # of the job that the policy lets wait
        last = outbox.last_sequence()
        if last is not None and last >= self.state.next_sequence and self.state.job is None:
            # A lost state file must not make this device use a number twice.
            self.state = self.state.model_copy(update={"next_sequence": last + 1})

    def run(self) -> ClientReport:
        """Work until the federation ends, `max_updates` is reached or the process is told to stop."""
        while True:
            self._online(self.follow)
            if self.state.job is None and self._may_start():
                self.start_job()
            if self._may_finish():
                self.finish_job()
            self._online(self.send)
            reason = self._reason_to_stop()
            if reason is not None:
                break
            if not self._may_start():
                self._wait(self.config.control.poll_s)
        if reason != "stopped":
            self._online(lambda: self.send(patience_s=_FAREWELL_S))
        return ClientReport(reason=reason, updates=self._updates, waiting=len(self.outbox.pending()))

    def follow(self) -> None:
        """Read the control topic to its end and fetch the newest model.

        Raises:
            TransportError: the log or the blob store does not answer.
            SnapshotError: the published snapshot is broken at its source.
        """
        identity, (low, high) = self.log.identity(CONTROL), self.log.watermarks(CONTROL)[0]
        if identity != self._control_log or not self._goes_on(low, high):  # nothing of what is there was read yet
            self._control_log, self._control_offset = identity, low
        start = self._control_offset
        for record in self.log.read(CONTROL, {0: (start, high)}) if start < high else ():
            self._obey(record.value, dict(record.headers))
            self._control_offset, self._control_digest = record.offset + 1, record.digest
        self._queue_unnamed()
        event, held = self._announced, self.state.model
        if event is not None and (held is None or event.snapshot != held.snapshot):
            self._fetch(event)

    def _goes_on(self, low: int, high: int) -> bool:
        """Tell whether the record read last is still in its place; if not, the topic lost records and grew again."""
        last = self._control_offset - 1
        if not low <= last < high:
            return False
        try:
            (record,) = self.log.read(CONTROL, {0: (last, last + 1)})
        except LogError as error:
            raise TransportError(f"control topic changed while it was read: look again ({error})") from None
        return record.digest == self._control_digest

    def _obey(self, value: bytes, headers: dict[str, bytes]) -> None:
        try:
            event = verify_event(value, headers, self.config.control.public_key)
        except ContractError as error:
            _log.warning("control.ignored", reason=error.reason)
            return
        if event.federation != self.config.federation:
            _log.warning("control.ignored", reason="foreign_federation", federation=event.federation)
        elif isinstance(event, UpdatesSettled):
            self.outbox.confirm(event.update_ids)
        elif isinstance(event, ResendUnsettled):
            self._send_again(event)
        elif isinstance(event, FederationEnd) and self._is_current(event):
            self._ended = event
        elif isinstance(event, ModelAvailable) and self._is_current(event):
            self._announced, self._ended = event, None

    def _send_again(self, event: ResendUnsettled) -> None:
        """Queue everything that was sent and is not settled, once per event; a crash between only repeats it."""
        if event.chain_seq <= self.state.resent_seq:
            return
        late = [item.update_id for item in self.outbox.unconfirmed()]
        self.outbox.send_again(late)
        failpoint("client.after_send_again")
        self._save(resent_seq=event.chain_seq)
        _log.info("client.sends_again", updates=len(late), chain_seq=event.chain_seq)

    def _is_current(self, event: FederationEnd | ModelAvailable) -> bool:
        """Tell whether an event is as new as the model held or announced; an older one was sent again by somebody."""
        newest = self._newest_seq()
        if event.chain_seq < newest:
            _log.warning("control.ignored", reason="older_than_held", chain_seq=event.chain_seq, held=newest)
        return event.chain_seq >= newest

    def _newest_seq(self) -> int:
        return max((each.chain_seq for each in (self._announced, self.state.model) if each), default=0)

    def _queue_unnamed(self) -> None:
        """Queue sent updates once more that no settlement names though a newer model came and the time is over.

        The clock starts anew with the process: a resend is harmless, tier 1 knows the id, but there is no haste in it.
        """
        now, newest = time.monotonic(), self._newest_seq()
        sent = [item.update_id for item in self.outbox.unconfirmed()]
        self._unnamed = {each: self._unnamed.get(each, (now, newest)) for each in sent}
        late = [
            each
            for each, (since_s, seq) in self._unnamed.items()
            if newest > seq and now - since_s >= self.config.control.resend_after_s
        ]
        if late:
            self.outbox.send_again(late)
            _log.info("client.sends_again", updates=len(late))

    def _fetch(self, event: ModelAvailable) -> None:
        manifest = SnapshotManifest.from_json(self.source.get(event.snapshot))
        if (manifest.version, manifest.digest) != (event.version, event.base_digest):
            raise SnapshotError(
                "bad_manifest",
                f"snapshot {event.snapshot} is version {manifest.version} with digest {manifest.digest}, "
                f"announced were {event.version} and {event.base_digest}: publish the snapshot again",
            )
        report = fetch(manifest, self.source, self.blobs)
        self.blobs.put(manifest.to_json())
        failpoint("client.after_fetch")
        model = Model(
            version=event.version, snapshot=event.snapshot, base_digest=manifest.digest, chain_seq=event.chain_seq
        )
        # The switch is this one rename; until then the old snapshot is the device's model.
        self._save(model=model, updates_on_model=0)
        keep = {event.snapshot} | ({self.state.job.model.snapshot} if self.state.job else set())
        pruned = prune(self.blobs, keep) if self._owns_blobs() else 0
        _log.info(
            "client.fetched", version=event.version, blobs=report.blobs, size_bytes=report.size_bytes, pruned=pruned
        )

    def _owns_blobs(self) -> bool:
        """Tell whether nobody else lives in this device's blob store; a shared one must not be pruned."""
        return os.path.realpath(self.blobs.uri) != os.path.realpath(self.source.uri)

    def start_job(self) -> None:
        """Choose and write down what the next update is made from."""
        how = self.config.training
        job = Job(
            sequence=self.state.next_sequence,
            model=self.state.model,
            first_row=self.state.next_row,
            n_rows=how.steps * how.batch_size,
        )
        self._save(job=job)
        failpoint("client.after_state")

    def finish_job(self) -> None:
        """Train, release and tick off the job, as far as that was not done; when stopped, leave it for the next start.

        An update that the policy refuses for good is dropped and its number with it; one that it lets wait stays.

        Raises:
            TrainingError: the loss is not finite.
        """
        job = self.state.job
        last = self.outbox.last_sequence()
        if last is None or last < job.sequence:
            try:
                report = None if self.spool.has(job.sequence) else self._train(job)
            except Interrupted:
                return
            self._wait(self.config.training.pace_s, until=lambda: self._ended is not None)
            if self.stopped():
                return
            try:
                self._release(job, report)
            except PolicyWait as wait:
                self._not_before_s = math.inf if wait.not_before_s is None else wait.not_before_s
                return
            except PayloadError:
                _log.warning("client.update_dropped", sequence=job.sequence)
        self.spool.remove(job.sequence)
        same_model = self.state.model is not None and self.state.model.snapshot == job.model.snapshot
        self._save(
            job=None,
            next_sequence=job.sequence + 1,
            next_row=job.first_row + job.n_rows,
            updates_on_model=self.state.updates_on_model + same_model,
        )
        self._updates += 1

    def _train(self, job: Job) -> LocalReport:
        try:
            return self.trainer.train(job, self.stopped)
        except SnapshotError as error:
            _log.warning("client.snapshot_damaged", reason=error.reason)
        manifest = SnapshotManifest.from_json(self.source.get(job.model.snapshot))
        fetch(manifest, self.source, self.blobs, verify=True)
        self.blobs.put(manifest.to_json())
        return self.trainer.train(job, self.stopped)

    def _release(self, job: Job, report: LocalReport | None) -> None:
        manifest = SnapshotManifest.from_json(self.blobs.get(job.model.snapshot))
        config = self.config
        envelope = self.sidecar.release(self.spool, job.sequence, base=manifest, now=time.time())
        failpoint("client.after_outbox")
        if report is not None:
            self._telemetry.append(
                TrainingTelemetry(
                    federation=config.federation,
                    client_id=config.client_id,
                    sequence=job.sequence,
                    base_version=job.model.version,
                    loss_first=report.loss_first,
                    loss_last=report.loss_last,
                    tokens=report.tokens,
                    seconds=report.seconds,
                    payload_bytes=envelope.payload_bytes,
                    expert_tokens=_expert_tokens(envelope),
                )
            )

    def send(self, patience_s: float = 0.0) -> None:
        """Send what waits in the outbox and, when nothing is left, telemetry.

        Raises:
            TransportError: telemetry could not be sent; updates that could not stay in the outbox.
        """
        payloads = BlobStore(self.config.payloads_uri)
        report = drain(
            self.outbox,
            self.log,
            payloads,
            now=time.time,
            rng=self._jitter,
            sleep=self._wait,
            patience_s=0.0 if self.stopped() else patience_s,
        )
        if report.sent:
            failpoint("client.after_send")
        while self._telemetry and not report.left:
            event = self._telemetry[0]
            headers = sign_event(event, self.signer)
            self.log.append(TELEMETRY, key=self.config.client_id.encode(), value=event.to_bytes(), headers=headers)
            self._telemetry.pop(0)

    def _may_start(self) -> bool:
        how, state = self.config.training, self.state
        return (
            state.model is not None
            and state.job is None
            and state.updates_on_model < how.updates_per_base
            and (how.max_updates is None or state.next_sequence < how.max_updates)
            and self._ended is None
            and not self.stopped()
        )

    def _may_finish(self) -> bool:
        return (
            self.state.job is not None
            and time.time() >= self._not_before_s
            and not self.stopped()
            and not self._cancelled()
        )

    def _cancelled(self) -> bool:
        return self._ended is not None and self._ended.reason == "cancelled"

    def _reason_to_stop(self) -> str | None:
        most = self.config.training.max_updates
        if self.stopped():
            return "stopped"
        if self._ended is not None:
            return f"federation {self._ended.reason}"
        if most is not None and self.state.next_sequence >= most and self.state.job is None:
            return f"training.max_updates = {most} reached"
        return None

    def _online(self, call: Callable[[], None]) -> None:
        try:
            call()
        except TransportError as error:
            if self.state.model is None:
                raise
            _log.warning("client.offline", problem=str(error))

    def _wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Sleep in slices until the time is over, `until` holds or the process is told to stop; follow meanwhile."""
        end = time.monotonic() + seconds
        next_look = time.monotonic() + self.config.control.poll_s
        while (left := end - time.monotonic()) > 0 and not self.stopped() and not until():
            time.sleep(min(left, _SLICE_S))
            if time.monotonic() >= next_look and left > _SLICE_S:
                self._online(self.follow)
                next_look = time.monotonic() + self.config.control.poll_s

    def _save(self, **changes: object) -> None:
        state = self.state.model_copy(update=changes)
        write_durable(self.config.home / "state.json", canonical_json(state.model_dump(mode="json")))
        self.state = state


def _expert_tokens(envelope: Envelope) -> dict[str, dict[str, int]] | None:
    """Return layer → expert → tokens as the envelope declares them, None for a model that telemetry has no room for."""
    experts = {
        layer: dict(zip(map(str, ids), envelope.tokens[layer], strict=True))
        for layer, ids in envelope.expert_ids.items()
        if ids
    }
    fits = len(experts) <= MAX_LAYERS and sum(map(len, experts.values())) <= MAX_EXPERTS
    return experts if fits else None


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM into a flag while inside; a thread other than the main one gets a flag that never rises."""
    raised: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _frame: raised.append(number))
    try:
        yield lambda: bool(raised)
    finally:
        signal.signal(signal.SIGTERM, previous)


def run(config: Tier2Config, *, log: UpdateLog | None = None) -> ClientReport:
    """Run the device loop until the federation ends, `max_updates` is reached or SIGTERM arrives.

    Args:
        config: of this device.
        log: the update log; default: the Kafka broker of the configuration.

    Raises:
        DataError: no usable text.
        TransportError: the broker does not answer at the first start.
        SnapshotError: the published snapshot is broken.
        TrainingError: the loss is not finite.
    """
    from fednested_lib.kafka_log import KafkaLog

    with ExitStack() as stack:
        outbox = stack.enter_context(Outbox(config.home / "outbox", max_bytes=config.outgoing.outbox_bytes))
        if log is None:
            log = stack.enter_context(closing(KafkaLog(config.log.servers(), timeout_s=config.log.timeout_s)))
        stopped = stack.enter_context(_sigterm())
        return Client(config, log, outbox, stopped).run()

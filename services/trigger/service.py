"""The loop: read tasks, launch them, bury what cannot be launched, commit behind what is settled.

    waiting   not settled yet; tried again after 1, 2, 4 … seconds, at most `LONGEST_S`
    settled   launched (confirmed by Flyte), buried (acknowledged by the log), or another federation's

The committed offset never passes a waiting task, so a killed trigger reads it again; tasks behind it go on meanwhile,
and read again they meet their own executions. With the offset go the log's identity and the digest of the record before
it: another log, or one that gave its offsets anew, is read from its beginning.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from fednested_lib.errors import ContractError, EnvelopeError, LogError, TransportError
from fednested_lib.events import SIGNATURE_HEADER, TrainingTask, parse_event
from fednested_lib.failpoints import failpoint
from fednested_lib.log import TASKS, Record, UpdateLog
from fednested_lib.signing import verify
from services.trigger.inbox import MAX_DETAIL_BYTES, Position, Positions, bury, place_of
from services.trigger.launch import Launcher, order_of

MAX_WAITING = 256  # read ahead of the committed offset; beyond it reading waits too
FIRST_S, LONGEST_S = 1.0, 300.0
log = structlog.get_logger()


@dataclass
class _Waiting:
    record: Record
    due: float
    tries: int = 0


class Trigger:
    """One consumer of `tasks.training`. A second one beside it is of no use and does no harm.

    Args:
        update_log: holds tasks and dead letters.
        positions: where reading goes on.
        launcher: launches executions.
        federation: tasks of another one on the same log are passed over.
        trusted: public keys whose tasks count.
        routes: kind of task → launch plan.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        update_log: UpdateLog,
        positions: Positions,
        launcher: Launcher,
        *,
        federation: str,
        trusted: frozenset[str],
        routes: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._log, self._positions, self._launcher = update_log, positions, launcher
        self._federation, self._trusted, self._routes = federation, trusted, routes
        self._clock = clock
        self._log_id = ""
        self._next: dict[int, int] = {}
        self._committed: dict[int, Position] = {}
        self._digests: dict[tuple[int, int], str] = {}  # of what was read, from the record before the committed offset
        self._waiting: dict[tuple[int, int], _Waiting] = {}

    def run(self, stop: threading.Event, *, poll_s: float = 1.0) -> None:
        """Turn until `stop` is set; a launch that has begun is finished first.

        Raises:
            LogError: the log ends before the committed offset.
        """
        failures = 0
        while not stop.is_set():
            try:
                self.turn(stop)
                failures = 0
            except TransportError as error:
                failures += 1
                log.warning("trigger.log_unreachable", error=str(error), failures=failures)
            stop.wait(max(poll_s, _pause(failures)) if failures else poll_s)
        log.info("trigger.stopped", waiting=len(self._waiting))

    def turn(self, stop: threading.Event | None = None) -> None:
        """Read what is new, try what is due, and commit.

        Raises:
            LogError: the log ends before the committed offset.
            TransportError: the log does not answer.
        """
        self._read()
        for place in sorted(place for place, waiting in self._waiting.items() if waiting.due <= self._clock()):
            if stop is not None and stop.is_set():
                break
            self._try(place)
            self._commit()  # after each, so that a trigger which dies often still gets on

    # one task -----------------------------------------------------------------------------------------------------

    def _try(self, place: tuple[int, int]) -> None:
        waiting = self._waiting[place]
        try:
            settled = self._settle(waiting.record)
        except TransportError as error:
            self._postpone(waiting, str(error))
            return
        if settled:
            del self._waiting[place]
        else:
            self._postpone(waiting, "skipped: the launch plan's concurrency policy")

    def _settle(self, record: Record) -> bool:
        try:
            task = self._task(record)
            if task is None:
                return True
            order = order_of(task, self._routes)
            failpoint("trigger.before_launch")
            if not self._launcher.launch(order):
                return False
        except ContractError as error:
            bury(self._log, record, error)
            failpoint("trigger.after_burial")
            detail = str(error)[:MAX_DETAIL_BYTES]
            log.warning("trigger.buried", place=place_of(record), reason=error.reason, detail=detail)
            return True
        failpoint("trigger.after_launch")
        log.info("trigger.launched", place=place_of(record), task=task.task_id, execution=order.name, plan=order.plan)
        return True

    def _task(self, record: Record) -> TrainingTask | None:
        """Return the task of a record, None if it is another federation's.

        Raises:
            EnvelopeError: reason ``bad_event`` or ``bad_signature``.
        """
        task = parse_event(record.value)
        if not isinstance(task, TrainingTask):
            raise EnvelopeError("bad_event", f"{record.topic} carries tasks, got {task.event}: correct the sender")
        if task.federation != self._federation:
            log.info("trigger.passed_over", place=place_of(record), federation=task.federation)
            return None
        signature = dict(record.headers).get(SIGNATURE_HEADER, b"").decode("ascii", "replace")
        if not any(verify(key, signature, record.value) for key in self._trusted):
            raise EnvelopeError(
                "bad_signature",
                f"task {task.task_id} is unsigned or signed by a key that identity.trusted does not name: "
                "sign it with tier 1's key",
            )
        return task

    def _postpone(self, waiting: _Waiting, why: str) -> None:
        waiting.tries += 1
        pause_s = _pause(waiting.tries)
        waiting.due = self._clock() + pause_s
        log.warning("trigger.waits", place=place_of(waiting.record), tries=waiting.tries, again_in_s=pause_s, why=why)

    # offsets ------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        log_id, ends = self._log.identity(TASKS), self._log.watermarks(TASKS)
        if log_id != self._log_id or not ends.keys() <= self._next.keys() or not self._goes_on(ends):
            self._begin(log_id, ends)
        for partition, (low, high) in sorted(ends.items()):
            start = self._start(partition, low, high)
            end = min(high, start + MAX_WAITING - len(self._waiting))
            for record in self._log.read(TASKS, {partition: (start, end)}) if start < end else ():
                self._waiting[partition, record.offset] = _Waiting(record=record, due=self._clock())
                self._digests[partition, record.offset] = record.digest
                self._next[partition] = record.offset + 1

    def _goes_on(self, ends: Mapping[int, tuple[int, int]]) -> bool:
        """Tell whether what is new follows what was read last; a wiped log gives the same offsets anew."""
        return all(
            self._is_of_this_log(partition, self._position(partition, self._next[partition]), low, high)
            for partition, (low, high) in ends.items()
            if self._next[partition] < high
        )

    def _begin(self, log_id: str, ends: Mapping[int, tuple[int, int]]) -> None:
        """Go on where the committed offsets say; from the oldest task if they are another log's."""
        self._log_id, self._committed = log_id, self._positions.load(TASKS, sorted(ends))
        self._next, self._waiting, self._digests = {}, {}, {}
        for partition, (low, high) in ends.items():
            saved = self._committed.get(partition, Position(offset=low))
            if self._is_of_this_log(partition, saved, low, high):
                self._next[partition] = saved.offset
                self._digests[partition, saved.offset - 1] = saved.digest
            else:
                self._next[partition] = low
                log.error("trigger.another_log", partition=partition, committed=saved.offset, first=low, log_id=log_id)

    def _is_of_this_log(self, partition: int, saved: Position, low: int, high: int) -> bool:
        if saved.log_id and saved.log_id != self._log_id:
            return False
        last = saved.offset - 1
        if not saved.digest or not low <= last < high:
            return True  # nothing to compare with; an offset beyond the end is reported as such
        (record,) = self._log.read(TASKS, {partition: (last, last + 1)})
        return record.digest == saved.digest

    def _start(self, partition: int, low: int, high: int) -> int:
        start = self._next[partition]
        if high < start:
            raise LogError(
                f"{TASKS}[{partition}] ends at offset {high}, but tasks up to {start} were settled: connect the right "
                "log, or reset the trigger's group to the beginning, which launches nothing twice"
            )
        if low > start:
            log.error("trigger.tasks_expired", partition=partition, first=start, last=low - 1, remedy="raise retention")
            self._next[partition] = low
        return max(start, low)

    def _commit(self) -> None:
        settled = {}
        for partition, end in self._next.items():
            first = min((offset for place, offset in self._waiting if place == partition), default=end)
            position = self._position(partition, first)
            if position != self._committed.get(partition):
                settled[partition] = position
        if settled:
            failpoint("trigger.before_commit")
            self._positions.save(TASKS, settled)
            self._committed |= settled
            self._forget()

    def _position(self, partition: int, offset: int) -> Position:
        return Position(offset=offset, log_id=self._log_id, digest=self._digests.get((partition, offset - 1), ""))

    def _forget(self) -> None:
        """Let go of the digests that no commit can need any more."""
        for partition, offset in list(self._digests):
            if offset < self._committed[partition].offset - 1:
                del self._digests[partition, offset]


def _pause(tries: int) -> float:
    return min(LONGEST_S, FIRST_S * 2 ** min(tries - 1, 30))

"""The cut: which records of the update log one version consumes.

A cut is a half-open offset range per partition, bound to the log it was read from (identity and a digest over the
record digests). It starts where the chain's offsets end; no consumer-group commit has a say. So a log that lost records
or re-used offsets is a named stop, never a silently different version; `new_log` says how to go on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from fednested_lib.errors import LogError
from fednested_lib.log import UPDATES, Record, UpdateLog, records_digest
from tier1.versions.manifest import Cut
from tier1.versions.state import Consumed

POLL_S = 0.2
ACCEPT = "; if what it lost is gone for good, `fednested tier1 accept-log` goes on and devices send again"


def take_cut(
    log: UpdateLog,
    state: Consumed,
    *,
    min_updates: int,
    max_wait_s: float,
    max_updates: int,
    topic: str = UPDATES,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Cut:
    """Wait for `min_updates` new records or `max_wait_s` seconds, whichever is first, and cut.

    Args:
        log: the update log.
        state: of the chain, or what it says has been consumed.
        min_updates: K of the buffer, ≥ 1.
        max_wait_s: T of the buffer, seconds.
        max_updates: largest number of records, shared fairly between partitions.
        topic: topic of device updates.
        now: clock in seconds.
        sleep: waits for seconds.

    Returns:
        The cut; `n_records` 0 when nothing arrived.

    Raises:
        LogError: the log is another one than before, lost records, or re-used offsets.
        TransportError: the log does not answer.
    """
    log_id = log.identity(topic)
    if state.log is not None and state.log != (topic, log_id):
        raise LogError(
            f"the last cut was taken from {state.log[0]} of log {state.log[1]}, this one is {log_id}: "
            f"connect the log that the chain has consumed{ACCEPT}"
        )
    deadline = now() + max_wait_s
    while True:
        available = _available(log, state, topic)
        n_available = sum(end - start for start, end in available.values())
        if n_available >= min_updates or now() >= deadline:
            break
        sleep(min(POLL_S, max(deadline - now(), 0.0)))
    _check_last_records(log, state, topic)
    ranges = _share(available, max_updates)
    records = log.read(topic, {int(partition): bounds for partition, bounds in ranges.items()})
    return Cut(
        topic=topic,
        log_id=log_id,
        ranges=ranges,
        records_digest=records_digest(records),
        n_records=sum(end - start for start, end in ranges.values()),
        generation=state.generation,
    )


def read_cut(log: UpdateLog, cut: Cut) -> list[Record]:
    """Read the records of a cut again and compare them with what it was taken from.

    Raises:
        LogError: another log, lost records, or other records than the cut names.
    """
    log_id = log.identity(cut.topic)
    if log_id != cut.log_id:
        raise LogError(
            f"cut of {cut.topic} was taken from log {cut.log_id}, this one is {log_id}: connect the right log{ACCEPT}"
        )
    records = list(log.read(cut.topic, {int(partition): tuple(bounds) for partition, bounds in cut.ranges.items()}))
    digest = records_digest(records)
    if digest != cut.records_digest or len(records) != cut.n_records:
        raise LogError(
            f"records {_text(cut.ranges)} of {cut.topic} have digest {digest}, the cut names {cut.records_digest}: "
            f"the log was altered or re-used offsets; restore it{ACCEPT}"
        )
    return records


def _available(log: UpdateLog, state: Consumed, topic: str) -> dict[str, tuple[int, int]]:
    """Return partition → (first offset to consume, end of the log)."""
    available = {}
    watermarks = log.watermarks(topic)
    gone = sorted(set(state.offsets) - {str(partition) for partition in watermarks})
    if gone:
        raise LogError(f"partition {gone[0]} of {topic}, which the chain has consumed, is gone: connect the right log")
    for partition, (low, high) in sorted(watermarks.items()):
        start = state.offsets.get(str(partition), low)
        if high < start:
            raise LogError(
                f"{topic}[{partition}] ends at offset {high}, but the chain has consumed up to {start}: watermarks "
                f"went backwards; restore the log or connect the right one{ACCEPT}"
            )
        if low > start:
            raise LogError(
                f"{topic}[{partition}] begins at offset {low}, but offsets {start}..{low - 1} were never consumed: "
                f"retention removed them; restore them, and raise the topic's retention{ACCEPT}"
            )
        available[str(partition)] = (start, high)
    return available


def _check_last_records(log: UpdateLog, state: Consumed, topic: str) -> None:
    """Compare the last consumed record of each partition, where the log still has it, with the chain's digest."""
    watermarks = log.watermarks(topic)
    for partition, (offset, digest) in sorted(state.last_records.items()):
        if watermarks[int(partition)][0] > offset:
            continue
        for record in log.read(topic, {int(partition): (offset, offset + 1)}):
            if record.digest != digest:
                raise LogError(
                    f"{topic}[{partition}] offset {offset} has record digest {record.digest}, the chain consumed "
                    f"{digest}: the log re-used offsets; restore it or connect the right one{ACCEPT}"
                )


def _share(available: Mapping[str, tuple[int, int]], max_updates: int) -> dict[str, tuple[int, int]]:
    """Bound the number of records; no partition waits behind a full one."""
    taken = dict.fromkeys(available, 0)
    left = max_updates
    while left > 0:
        waiting = [p for p, (start, end) in available.items() if start + taken[p] < end]
        if not waiting:
            break
        share = max(1, left // len(waiting))
        for partition in waiting:
            start, end = available[partition]
            step = min(share, end - start - taken[partition], left)
            taken[partition] += step
            left -= step
    return {partition: (start, start + taken[partition]) for partition, (start, _) in available.items()}


def _text(ranges: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{partition}:[{start}, {end})" for partition, (start, end) in sorted(ranges.items()))

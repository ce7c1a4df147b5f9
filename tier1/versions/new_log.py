"""Go on with a log that lost records, re-used offsets, or is another one: an operator's decision, and an entry.

Nothing that the chain holds depends on the log any more: what was accepted lies in the archive. So only the place where
the next cut starts has to be found, per partition:

    same log       the first offset whose record is not the one that the chain consumed, or the end of the log
    another log    its beginning

and everything from there on is read, as records of a new generation. What devices send again is then new, or a
duplicate by (client, key epoch, sequence), wherever it lies: every update is in the chain once.
"""

from __future__ import annotations

from collections.abc import Mapping

from fednested_lib.errors import ChainError
from fednested_lib.log import UPDATES, UpdateLog
from tier1.versions.manifest import LogAccepted
from tier1.versions.state import ChainState


def describe_log(
    log: UpdateLog,
    state: ChainState,
    *,
    operator: str,
    authorisation: str,
    reason: str,
    created_at: str,
    topic: str = UPDATES,
) -> LogAccepted:
    """Say how the chain goes on with the log as it is now.

    Args:
        log: as it came back.
        state: the chain, which knows the digest of every record it consumed.
        operator: principal that accepts it; recorded.
        authorisation: id of the policy decision; recorded.
        reason: why, one line; recorded.
        created_at: time of the entry.
        topic: topic of device updates.

    Raises:
        ChainError: the log still holds the place where the chain stands: nothing is to be accepted.
        TransportError: the log does not answer.
    """
    log_id = log.identity(topic)
    same = state.log in (None, (topic, log_id))
    offsets = {
        str(partition): _first_new(log, topic, partition, bounds, state) if same else bounds[0]
        for partition, bounds in log.watermarks(topic).items()
    }
    if same and all(state.offsets.get(partition, offset) == offset for partition, offset in offsets.items()):
        raise ChainError(
            f"log {log_id} of {topic} holds every record up to {dict(state.offsets)}, where the chain stands: there is "
            "nothing to accept, go on with aggregate-experts"
        )
    return LogAccepted(
        generation=state.generation + 1,
        topic=topic,
        log_id=log_id,
        offsets=offsets,
        consumed=dict(state.offsets),
        operator=operator,
        authorisation=authorisation,
        reason=reason,
        created_at=created_at,
    )


def lost_ranges(accepted: LogAccepted) -> dict[str, tuple[int, int]]:
    """Return partition → half-open range that the chain consumed and the log no longer answers for."""
    ends = {partition: (accepted.offsets.get(partition, 0), end) for partition, end in accepted.consumed.items()}
    return {partition: (start, end) for partition, (start, end) in sorted(ends.items()) if start < end}


def lost_text(accepted: LogAccepted) -> str:
    """Return `lost_ranges` as people read them."""
    ranges = lost_ranges(accepted).items()
    return ", ".join(f"{partition}:[{start}, {end})" for partition, (start, end) in ranges) or "nothing"


def _first_new(log: UpdateLog, topic: str, partition: int, bounds: tuple[int, int], state: ChainState) -> int:
    """Return the first offset that holds, or will hold, a record that the chain did not consume from there."""
    low, high = bounds
    known: Mapping[int, str] = state.records.get(str(partition), {})
    end = min(high, state.offsets.get(str(partition), low))
    start = max(low, min(known, default=end))
    for record in log.read(topic, {partition: (start, end)}) if start < end else ():
        if known.get(record.offset) != record.digest:
            return record.offset
    return max(low, end)

"""Refused records, kept with their reason on `updates.experts.quarantine`.

The manifest records every refusal; this topic keeps the bytes, so that nothing is lost when the source topic's
retention passes. A quarantined record has the key `<topic>/<partition>/<offset>` of its source (and the generation of
the log, after an operator accepted another one), the original value and envelope, and the reason as headers. Delivery
is at least once: a crash may repeat a record, never lose one; readers dedupe by key.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from fednested_lib.envelope import HEADER
from fednested_lib.errors import LogError, PayloadError
from fednested_lib.failpoints import failpoint
from fednested_lib.log import QUARANTINE, Record, UpdateLog
from tier1.versions.manifest import Cut, Refused

log = structlog.get_logger()

REASON_HEADER = "fednested-reason"
DETAIL_HEADER = "fednested-detail"
SOURCE_HEADER = "fednested-source"
RECORD_HEADER = "fednested-record-sha256"
_LOOK_BACK = 10_000  # records; older repetitions are left to the readers


def publish_refused(refused: Sequence[Refused], cut: Cut, update_log: UpdateLog) -> int:
    """Send the refused records of a committed cut to quarantine; those that are there already are skipped.

    Args:
        refused: as the manifest records them.
        cut: which topic they came from.
        update_log: holds source and quarantine.

    Returns:
        How many were sent.

    Raises:
        TransportError: the log does not answer; publish again later.
    """
    if not refused:
        return 0
    there = _recent_keys(update_log)
    missing = [record for record in refused if _key(cut, record) not in there]
    for record in missing:
        _publish(record, cut, update_log)
        failpoint("quarantine.after_publish")
    log.info("quarantine.published", n_records=len(missing), n_skipped=len(refused) - len(missing))
    return len(missing)


def _key(cut: Cut, record: Refused) -> bytes:
    generation = f"/{cut.generation}" if cut.generation else ""
    return f"{cut.topic}/{record.partition}/{record.offset}{generation}".encode()


def _recent_keys(update_log: UpdateLog) -> set[bytes]:
    ranges = {
        partition: (max(low, high - _LOOK_BACK), high)
        for partition, (low, high) in update_log.watermarks(QUARANTINE).items()
    }
    return {record.key for record in update_log.read(QUARANTINE, ranges)}


def _publish(record: Refused, cut: Cut, update_log: UpdateLog) -> None:
    key, headers = _key(cut, record), _headers(record, cut)
    original = _original(record, cut, update_log)
    if original is not None:
        envelopes = [value for name, value in original.headers if name == HEADER]
        # A log record has one header of a name; a hostile one that had more keeps them all.
        names = [HEADER, *(f"{HEADER}.{i}" for i in range(1, len(envelopes)))]
        try:
            whole = headers | dict(zip(names, envelopes, strict=False))
            update_log.append(QUARANTINE, key=key, value=original.value, headers=whole)
            return
        except PayloadError:
            log.warning("quarantine.too_large", partition=record.partition, offset=record.offset)
    update_log.append(QUARANTINE, key=key, value=b"", headers=headers)


def _original(record: Refused, cut: Cut, update_log: UpdateLog) -> Record | None:
    """Return the source record, None if the log has forgotten or replaced it; then the reason alone is kept."""
    try:
        for found in update_log.read(cut.topic, {record.partition: (record.offset, record.offset + 1)}):
            return found if found.digest == record.record_sha256 else None
    except LogError:
        log.warning("quarantine.original_gone", partition=record.partition, offset=record.offset)
    return None


def _headers(record: Refused, cut: Cut) -> dict[str, bytes]:
    return {
        REASON_HEADER: record.reason.encode(),
        DETAIL_HEADER: record.detail.encode(),
        SOURCE_HEADER: f"{cut.log_id} {cut.topic}/{record.partition}/{record.offset}".encode(),
        RECORD_HEADER: record.record_sha256.encode(),
    }

"""The control topic as a device follows it: from its beginning, verified, and again from its beginning if it changed.

A topic that came back shorter, as another one, or with other records in place of those read is no news of its own: what
is there now is read as if nothing had been. Events heard twice change nothing, so that is always safe.
"""

from __future__ import annotations

from collections.abc import Iterator

import structlog

from fednested_lib.errors import ContractError, LogError, TransportError
from fednested_lib.events import Event, verify_event
from fednested_lib.log import CONTROL, Record, UpdateLog

_log = structlog.get_logger(__name__)


class ControlTopic:
    """Reads what tier 1 says.

    Args:
        log: the update log.
        federation: events of others are ignored.
        public_key: tier 1's; events that it did not sign are ignored.
    """

    def __init__(self, log: UpdateLog, *, federation: str, public_key: str):
        self.log, self.federation, self.public_key = log, federation, public_key
        self._identity = ""
        self._offset = 0
        self._digest = ""  # of the record before the offset

    def news(self) -> Iterator[Event]:
        """Yield the events that were not read yet; one counts as read when the next is asked for.

        Raises:
            TransportError: the log does not answer.
        """
        identity, (low, high) = self.log.identity(CONTROL), self.log.watermarks(CONTROL)[0]
        if identity != self._identity or not self._goes_on(low, high):  # nothing of what is there was read yet
            self._identity, self._offset = identity, low
        start = self._offset
        for record in self.log.read(CONTROL, {0: (start, high)}) if start < high else ():
            event = self._verified(record)
            if event is not None:
                yield event
            self._offset, self._digest = record.offset + 1, record.digest

    def _goes_on(self, low: int, high: int) -> bool:
        """Tell whether the record read last is still in its place; if not, the topic lost records and grew again."""
        last = self._offset - 1
        if not low <= last < high:
            return False
        try:
            (record,) = self.log.read(CONTROL, {0: (last, last + 1)})
        except LogError as error:
            raise TransportError(f"control topic changed while it was read: look again ({error})") from None
        return record.digest == self._digest

    def _verified(self, record: Record) -> Event | None:
        try:
            event = verify_event(record.value, dict(record.headers), self.public_key)
        except ContractError as error:
            _log.warning("control.ignored", reason=error.reason)
            return None
        if event.federation != self.federation:
            _log.warning("control.ignored", reason="foreign_federation", federation=event.federation)
            return None
        return event

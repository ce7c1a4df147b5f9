"""What a device sends a second time: what nobody has named as settled.

Either tier 1 asks for it, because it goes on with a log that lost records, or a newer model came, nobody named an
update that was sent, and the time is over. A resend is harmless: tier 1 knows the id.
"""

from __future__ import annotations

import time

import structlog

from fednested_lib.outbox import Outbox

_log = structlog.get_logger(__name__)


def queue_all(outbox: Outbox, chain_seq: int) -> None:
    """Queue everything that was sent and is not settled."""
    late = [item.update_id for item in outbox.unconfirmed()]
    outbox.send_again(late)
    _log.info("sidecar.sends_again", updates=len(late), chain_seq=chain_seq)


class Unnamed:
    """The sent updates that no settlement has named, and since when; the clock starts anew with the process.

    Args:
        outbox: where they are.
        after_s: how long to wait.
    """

    def __init__(self, outbox: Outbox, after_s: float):
        self.outbox, self.after_s = outbox, after_s
        self._since: dict[str, tuple[float, int]] = {}  # update id → when it was first seen so, and on which chain

    def queue(self, newest: int) -> None:
        """Queue those once more whose time is over.

        Args:
            newest: position in the chain of the newest model known.
        """
        now = time.monotonic()
        sent = [item.update_id for item in self.outbox.unconfirmed()]
        self._since = {each: self._since.get(each, (now, newest)) for each in sent}
        late = [each for each, (since, seq) in self._since.items() if newest > seq and now - since >= self.after_s]
        if late:
            self.outbox.send_again(late)
            self._since |= {each: (now, self._since[each][1]) for each in late}  # not again at every look
            _log.info("sidecar.sends_again", updates=len(late))

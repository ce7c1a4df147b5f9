"""What an operator does after the named stop of a log that lost records: accept it as it is, and tell the devices.

The entry comes first; that devices are told to send again what no receipt names is a view, repaired like the others.
"""

from __future__ import annotations

import structlog

from fednested_lib.errors import ChainConflict
from fednested_lib.log import UPDATES
from tier1.federation import Federation
from tier1.loops.anchors import require_whole_chain
from tier1.loops.genesis import now_text
from tier1.loops.views import publish_outcomes
from tier1.versions.manifest import LogAccepted
from tier1.versions.new_log import describe_log

log = structlog.get_logger()


def accept_log(fed: Federation, reason: str) -> LogAccepted:
    """Append the entry that accepts the log as it is now, and ask the devices for what is not settled.

    Args:
        fed: the federation.
        reason: why, one line; recorded.

    Raises:
        PolicyDenied: this principal may not aggregate from the topic (purpose ``accept-log``).
        ChainError: the log holds the place where the chain stands, or there is no chain.
        ChainCorrupt: the chain's own end is missing: a log is not accepted to cover that.
        TransportError: the log does not answer.
    """
    grant = fed.authorise("aggregate", f"topic:{UPDATES}", purpose="accept-log")
    require_whole_chain(fed)
    publish_outcomes(fed)  # what a crash after an earlier entry left to tell
    while True:
        state = fed.chain.state()
        body = describe_log(
            fed.log,
            state,
            operator=fed.config.identity.principal,
            authorisation=grant.id,
            reason=reason,
            created_at=now_text(),
        )
        try:
            fed.chain.append(body, state.next_seq)
            break
        except ChainConflict:  # a committer was at work: look at the log again from where the chain is now
            log.info("log.lost_race", seq=state.next_seq)
    publish_outcomes(fed)
    log.info("log.accepted", generation=body.generation, log=body.log_id, offsets=body.offsets)
    return body

"""Anchors: the chain's end as others remember it, compared before anything is built on it.

No hash link shows that the end of a chain was cut off. The registry's tag and the last champion announced under our
own signature do; they lie outside the chain. A chain that lacks what they name is refused before a fork can grow.
"""

from __future__ import annotations

from collections.abc import Iterator

import structlog

from fednested_lib.errors import EnvelopeError, TransportError
from fednested_lib.events import ModelAvailable, verify_event
from fednested_lib.log import CONTROL
from tier1.federation import Federation
from tier1.governance.registry import check_anchor

log = structlog.get_logger()


def check_end(fed: Federation) -> Iterator[str]:
    """Compare the chain with both anchors; one line each, also for one that cannot be reached.

    Raises:
        ChainCorrupt: the chain lacks an entry that an anchor names.
    """
    try:
        anchor = fed.registry.anchor()  # read before the chain, which may only have grown since
        check_anchor(anchor, [sealed.digest for sealed in fed.chain.entries()])
        yield "anchor: the chain holds the head that the registry remembers"
    except TransportError as error:
        yield f"anchor: NOT compared with the registry, which does not answer ({error})"
    try:
        announced = last_announced(fed)
    except TransportError as error:
        yield f"control topic: NOT compared, the log does not answer ({error})"
        return
    if announced is not None:
        fed.chain.verify_anchor(announced.chain_seq, announced.chain_head)
        yield f"control topic: the chain holds the head that was announced with version {announced.version}"


def require_whole_chain(fed: Federation) -> None:
    """Refuse to go on with a chain whose end was cut off or rewritten; an anchor out of reach is a warning.

    Raises:
        ChainCorrupt: the chain lacks an entry that an anchor names.
    """
    for line in check_end(fed):
        if "NOT compared" in line:
            log.warning("chain.anchor_unreachable", line=line)


def last_announced(fed: Federation) -> ModelAvailable | None:
    """Return the newest champion announced on the control topic under our own signature."""
    low, high = fed.log.watermarks(CONTROL)[0]
    newest = None
    for record in fed.log.read(CONTROL, {0: (low, high)}):
        try:
            event = verify_event(record.value, dict(record.headers), fed.signer.public_key)
        except EnvelopeError:
            continue  # somebody else's record says nothing about our chain
        if isinstance(event, ModelAvailable) and event.federation == fed.config.federation:
            newest = event
    return newest

"""The outer loop's last step: publish the champion so that devices can fetch it, and tell them.

The weights lie in the blob store already; what is published is the manifest blob that names them, and a signed control
event. A device downloads only the blobs that it does not hold.
"""

from __future__ import annotations

import structlog

from fednested_lib.events import ModelAvailable
from fednested_lib.failpoints import failpoint
from tier1.federation import Federation
from tier1.loops.anchors import require_whole_chain
from tier1.loops.genesis import ensure_genesis
from tier1.loops.records import Published

log = structlog.get_logger()


def publish_champion(fed: Federation) -> Published:
    """Publish the newest approved version; announcing it twice is harmless.

    Raises:
        PolicyDenied: this principal may not publish the model.
        SnapshotError: a blob of the champion is missing or corrupt: nothing is announced.
        ChainCorrupt: the chain lacks what was announced or registered before.
        TransportError: the broker does not answer.
    """
    fed.authorise("publish", fed.model_resource)
    state = ensure_genesis(fed)
    require_whole_chain(fed)
    champion = state.champion
    if champion.version not in state.approved:
        log.info("broadcast.no_champion", head=state.head.version)
        return Published(version=-1, snapshot="", n_blobs=0, n_bytes=0)
    n_bytes = sum(len(fed.blobs.get(digest)) for digest in (*champion.blobs.values(), champion.tokenizer))
    snapshot = fed.blobs.put(champion.snapshot.to_json())
    failpoint("broadcast.before_event")
    event = ModelAvailable(
        federation=state.federation,
        version=champion.version,
        snapshot=snapshot,
        base_digest=champion.base_digest,
        chain_seq=state.seq,
        chain_head=state.digest,
    )
    fed.announce(event, key=b"champion")
    log.info("broadcast.published", version=champion.version, blobs=len(champion.blobs), size_bytes=n_bytes)
    return Published(version=champion.version, snapshot=snapshot, n_blobs=len(champion.blobs) + 1, n_bytes=n_bytes)

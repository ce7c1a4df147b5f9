"""The outer loop's last step: publish the champion so that devices can fetch it, and tell them.

The weights lie in the blob store already; what is published is the manifest blob that names them, and a signed control
event. A device downloads only the blobs that it does not hold.

With `broadcast.onnx` the champion is then exported for devices that only infer, and announced by an event of its own. A
graph that cannot be made, or whose logits are not torch's, is announced to nobody; what was published stays so.
"""

from __future__ import annotations

import json

import structlog

from fednested_lib.blobs import write_durable
from fednested_lib.errors import SnapshotError
from fednested_lib.events import ModelAvailable, OnnxAvailable
from fednested_lib.failpoints import failpoint
from tier1.federation import Federation
from tier1.loops.anchors import require_whole_chain
from tier1.loops.genesis import ensure_genesis
from tier1.loops.records import Published
from tier1.versions.onnx_export import REFUSALS, export_onnx, require_onnx
from tier1.versions.state import VersionView

log = structlog.get_logger()


def publish_champion(fed: Federation) -> Published:
    """Publish the newest approved version; announcing it twice is harmless.

    Raises:
        ConfigError: broadcast.onnx is set and its packages are missing; nothing is published.
        PolicyDenied: this principal may not publish the model.
        SnapshotError: a blob of the champion is missing or corrupt: nothing is announced.
        ChainCorrupt: the chain lacks what was announced or registered before.
        TransportError: the broker does not answer.
    """
    if fed.config.broadcast.onnx:
        require_onnx()
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
    return Published(
        version=champion.version,
        snapshot=snapshot,
        n_blobs=len(champion.blobs) + 1,
        n_bytes=n_bytes,
        onnx=_publish_onnx(fed, champion, snapshot) if fed.config.broadcast.onnx else "",
    )


def _publish_onnx(fed: Federation, champion: VersionView, snapshot: str) -> str:
    """Export and announce the champion's graph, once per snapshot; return its record's digest, or why there is none."""
    made = fed.home / "onnx" / snapshot
    if not (made.exists() and _whole(fed, made.read_text())):
        try:
            artefact = export_onnx(champion.snapshot, snapshot, fed.blobs)
        except SnapshotError as error:
            if error.reason not in REFUSALS:
                raise
            log.error("broadcast.onnx_refused", version=champion.version, reason=error.reason, detail=str(error))
            return str(error)
        log.info("broadcast.onnx_made", version=champion.version, size_bytes=artefact.n_bytes, max=artefact.difference)
        write_durable(made, artefact.record.encode())
    record = made.read_text()
    event = OnnxAvailable(federation=fed.config.federation, version=champion.version, snapshot=snapshot, record=record)
    fed.announce(event, key=b"onnx")
    return record


def _whole(fed: Federation, record: str) -> bool:
    """Tell whether the blob store still has a graph and the record of it."""
    if not fed.blobs.has(record):
        return False
    files = json.loads(fed.blobs.get(record))["files"]
    return all(fed.blobs.has(each["sha256"]) for each in files.values())

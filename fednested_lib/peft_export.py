"""Show what left, or is about to leave, in a form that others open: an update of the outbox as a peft adapter.

It is read from the envelope and the payload as the sidecar made them: withheld experts are zeros, rounding is in.
"""

from __future__ import annotations

from pathlib import Path

from fednested_lib.blobs import BlobStore
from fednested_lib.config import Tier2Config
from fednested_lib.delta import decode
from fednested_lib.envelope import Envelope, parse_envelope
from fednested_lib.errors import DataError
from fednested_lib.outbox import Outbox
from fednested_lib.peft_format import write_peft
from fednested_lib.sidecar_loop import SidecarState
from fednested_lib.snapshot import SnapshotManifest, expert_shapes
from fednested_lib.state import load_state


def export_update(config: Tier2Config, sequence: int, directory: Path) -> Envelope:
    """Write one update of a device that is stopped as a peft directory.

    Args:
        config: of the device.
        sequence: number of the update; it is kept until tier 1 has named it as settled.
        directory: created.

    Returns:
        The update's envelope.

    Raises:
        DataError: the update is not kept any more, or its base is not held.
        StorageError: the device is running, or the file system refuses.
        PayloadError: the update does not fit its base.
    """
    with Outbox(config.home / "outbox", max_bytes=config.outgoing.outbox_bytes) as outbox:
        items = {item.sequence: item for item in (*outbox.pending(), *outbox.unconfirmed(), *outbox.dead())}
        if sequence not in items:
            raise DataError(
                f"update {sequence} is not in the outbox, which keeps {sorted(items) or 'none'}: choose one of them"
            )
        envelope, payload = parse_envelope(items[sequence].envelope), outbox.payload(items[sequence])
    state = load_state(config.home / "sidecar" / "state.json", SidecarState)
    held = [model.snapshot for model in state.models if model.base_digest == envelope.base_digest]
    if not held:
        raise DataError(
            f"version {envelope.base_version}, which update {sequence} starts from, is not held any more: "
            "choose a newer update"
        )
    shapes = expert_shapes(SnapshotManifest.from_json(BlobStore(config.home / "blobs").get(held[0])))
    delta = decode(
        payload,
        encoding=envelope.encoding,
        spec=envelope.adapter.spec(),
        expert_ids=envelope.layers(),
        shapes=shapes,
    )
    write_peft(delta, directory, shapes)
    return envelope

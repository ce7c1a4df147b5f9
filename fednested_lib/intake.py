"""From the spool to the outbox: what the sidecar does with one update that the trainer has written.

    parse the declaration  →  find the snapshot that it names  →  parse the factors  →  release  →  telemetry

This is the only caller of `sidecar.release`.
"""

from __future__ import annotations

from collections.abc import Iterable

from fednested_lib.blobs import BlobStore
from fednested_lib.config import Tier2Config
from fednested_lib.delta import Delta
from fednested_lib.errors import PayloadError
from fednested_lib.events import TrainingTelemetry
from fednested_lib.failpoints import failpoint
from fednested_lib.orders import Model
from fednested_lib.outbox import Outbox
from fednested_lib.sidecar import release
from fednested_lib.signing import Signer
from fednested_lib.snapshot import SnapshotManifest, expert_shapes
from fednested_lib.spool import Declaration, Spool
from fednested_lib.telemetry import training_telemetry


class Intake:
    """Takes spooled updates of one device.

    Args:
        config: this device.
        spool: what the trainer writes.
        blobs: the device's own store.
        signer: its key.
        outbox: durable queue to the log.
    """

    def __init__(self, config: Tier2Config, spool: Spool, blobs: BlobStore, signer: Signer, outbox: Outbox):
        self.config, self.spool, self.blobs, self.signer, self.outbox = config, spool, blobs, signer, outbox

    def take(self, sequence: int, models: Iterable[Model]) -> TrainingTelemetry | None:
        """Put one update into the outbox; doing it again changes nothing.

        Args:
            sequence: its number.
            models: snapshots that an update may be made from.

        Returns:
            What to tell about it.

        Raises:
            PayloadError: it cannot leave; nothing does.
            OutboxFull: not now.
            StorageError: the disk is full.
        """
        declaration, delta = self._parse(sequence, models)
        config = self.config
        envelope = release(
            declaration,
            delta,
            policy=config.policy,
            federation=config.federation,
            client_id=config.client_id,
            key_epoch=config.key_epoch,
            signer=self.signer,
            outbox=self.outbox,
        )
        failpoint("sidecar.after_release")
        return training_telemetry(declaration, envelope)

    def _parse(self, sequence: int, models: Iterable[Model]) -> tuple[Declaration, Delta]:
        declaration = self.spool.declaration(sequence)
        base = (declaration.base_version, declaration.base_digest)
        for model in models:
            if (model.version, model.base_digest) == base:
                manifest = SnapshotManifest.from_json(self.blobs.get(model.snapshot))
                return declaration, self.spool.delta(declaration, expert_shapes(manifest))
        raise PayloadError(
            "unknown_base", f"update {sequence} is made from version {base[0]}, which is not held: train it again"
        )

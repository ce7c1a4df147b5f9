"""From the spool to the outbox: hands one update that the trainer has written to the sidecar, with what it needs.

This is the only caller of `Sidecar.release`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from fednested_lib.blobs import BlobStore
from fednested_lib.config import Tier2Config
from fednested_lib.events import TrainingTelemetry
from fednested_lib.orders import Model
from fednested_lib.sidecar import Queue, Sidecar, open_sidecar
from fednested_lib.snapshot import SnapshotManifest
from fednested_lib.spool import Spool


class Intake:
    """Takes spooled updates of one device.

    Args:
        sidecar: of the device.
        spool: what the trainer writes.
        blobs: the device's own store.
    """

    def __init__(self, sidecar: Sidecar, spool: Spool, blobs: BlobStore):
        self.sidecar, self.spool, self.blobs = sidecar, spool, blobs

    @classmethod
    def open(cls, config: Tier2Config, outbox: Queue) -> Intake:
        """Open the intake of a device, or refuse to.

        Raises:
            ConfigError: the policy is missing, unsigned, altered, older than one obeyed before, or does not fit.
            AuditError: the audit log was altered.
            StorageError: the file system refuses.
        """
        sidecar = open_sidecar(config, outbox, now=time.time())
        return cls(sidecar, Spool(config.home / "spool"), BlobStore(config.home / "blobs"))

    def take(self, sequence: int, models: Iterable[Model]) -> TrainingTelemetry | None:
        """Put one update into the outbox; doing it again changes nothing.

        Args:
            sequence: its number.
            models: snapshots that an update may be made from.

        Returns:
            What to tell about it.

        Raises:
            PayloadError: it cannot leave; nothing does.
            PolicyWait: the policy does not let it leave yet.
            OutboxFull: not now.
            StorageError: the disk is full.
        """
        held = {(model.version, model.base_digest): model.snapshot for model in models}

        def manifest(version: int, digest: str) -> SnapshotManifest | None:
            snapshot = held.get((version, digest))
            return None if snapshot is None else SnapshotManifest.from_json(self.blobs.get(snapshot))

        _, told = self.sidecar.release(self.spool, sequence, held=manifest, now=time.time())
        return told

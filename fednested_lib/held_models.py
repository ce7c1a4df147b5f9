"""The snapshots that a device holds: fetched, repaired and let go by the sidecar, only read by the trainer."""

from __future__ import annotations

import os
from collections.abc import Iterable

import structlog

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import SnapshotError
from fednested_lib.events import ModelAvailable
from fednested_lib.orders import KEPT, Model
from fednested_lib.snapshot import SnapshotManifest, fetch, prune

_log = structlog.get_logger(__name__)


def fetch_model(event: ModelAvailable, source: BlobStore, blobs: BlobStore) -> Model:
    """Bring what was announced into the device's own store.

    Raises:
        SnapshotError: it is broken at its source, or another version than was announced.
        TransportError: the source does not answer.
    """
    manifest = SnapshotManifest.from_json(source.get(event.snapshot))
    if (manifest.version, manifest.digest) != (event.version, event.base_digest):
        raise SnapshotError(
            "bad_manifest",
            f"snapshot {event.snapshot} is version {manifest.version} with digest {manifest.digest}, "
            f"announced were {event.version} and {event.base_digest}: publish the snapshot again",
        )
    report = fetch(manifest, source, blobs)
    blobs.put(manifest.to_json())
    _log.info("sidecar.fetched", version=event.version, blobs=report.blobs, size_bytes=report.size_bytes)
    return Model(version=event.version, snapshot=event.snapshot, base_digest=manifest.digest, chain_seq=event.chain_seq)


def repair_model(model: Model, source: BlobStore, blobs: BlobStore) -> None:
    """Read every blob of a held snapshot and fetch those anew that are damaged.

    Raises:
        SnapshotError: a blob is broken at its source too.
        TransportError: the source does not answer.
    """
    manifest = SnapshotManifest.from_json(source.get(model.snapshot))
    report = fetch(manifest, source, blobs, verify=True)
    blobs.put(manifest.to_json())
    _log.warning("sidecar.repaired", version=model.version, blobs=report.blobs)


def with_newest(models: list[Model], model: Model, in_use: str | None) -> list[Model]:
    """Return the held models with one more at the end, within what may be kept; the one in use stays."""
    models = [each for each in models if each.snapshot != model.snapshot]
    while len(models) >= KEPT:
        models.remove(next(each for each in models if each.snapshot != in_use))
    return [*models, model]


def prune_models(models: Iterable[Model], source: BlobStore, blobs: BlobStore) -> None:
    """Delete what none of these needs, unless somebody else lives in the store too."""
    if os.path.realpath(blobs.uri) != os.path.realpath(source.uri):
        _log.info("sidecar.pruned", blobs=prune(blobs, {model.snapshot for model in models}))

"""The snapshots that a device holds: fetched, repaired and let go by the sidecar, only read by the trainer."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable

import structlog

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import SnapshotError
from fednested_lib.events import ModelAvailable
from fednested_lib.orders import KEPT, Model
from fednested_lib.snapshot import SnapshotManifest, fetch, prune
from fednested_lib.transport import BlobSource

_log = structlog.get_logger(__name__)


def fetch_model(event: ModelAvailable, source: BlobSource, blobs: BlobStore) -> Model:
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


def repair_model(model: Model, source: BlobSource, blobs: BlobStore) -> None:
    """Read every blob of a held snapshot and fetch those anew that are damaged.

    Raises:
        SnapshotError: a blob is broken at its source too.
        TransportError: the source does not answer.
    """
    manifest = SnapshotManifest.from_json(source.get(model.snapshot))
    report = fetch(manifest, source, blobs, verify=True)
    blobs.put(manifest.to_json())
    _log.warning("sidecar.repaired", version=model.version, blobs=report.blobs)


def damaged_manifests(models: Iterable[Model], blobs: BlobStore) -> list[str]:
    """Return the digests of the held manifests that cannot be read."""
    damaged = []
    for model in models:
        try:
            blobs.get(model.snapshot)
        except SnapshotError as error:
            _log.warning("sidecar.manifest_damaged", version=model.version, reason=error.reason)
            damaged.append(model.snapshot)
    return damaged


def with_newest(models: list[Model], model: Model, needed: Collection[str | None]) -> list[Model]:
    """Return the held models with one more at the end, within what may be kept.

    Args:
        models: at most `KEPT`.
        model: the new one.
        needed: snapshots that stay, fewer than `KEPT`: the one in use, the one that is known to load.
    """
    models = [each for each in models if each.snapshot != model.snapshot]
    while len(models) >= KEPT:
        models.remove(next(each for each in models if each.snapshot not in needed))
    return [*models, model]


def still_needed(models: list[Model], in_use: str | None, loaded: str | None) -> list[Model]:
    """Return the held models without those that nobody will ask for: once the newest has loaded, its predecessors."""
    *older, newest = models
    if loaded != newest.snapshot:  # the way back stays open: what loaded last, else the predecessor
        in_sight = {each.snapshot for each in older}
        loaded = loaded if loaded in in_sight else older[-1].snapshot if older else None
    return [*(model for model in older if model.snapshot in (in_use, loaded)), newest]


def without_unloadable(models: list[Model], bad: str, loaded: str | None) -> list[Model]:
    """Return the held models without one that does not load, the one to go back to at the end; empty: there is none."""
    rest = [model for model in models if model.snapshot != bad]
    return sorted(rest, key=lambda model: model.snapshot == loaded)


def prune_models(models: Iterable[Model], source: BlobSource, blobs: BlobStore) -> None:
    """Delete what none of these needs, unless somebody else lives in the store too."""
    if os.path.realpath(blobs.uri) != os.path.realpath(source.uri):
        _log.info("sidecar.pruned", blobs=prune(blobs, {model.snapshot for model in models}))

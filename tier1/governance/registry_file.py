"""The file-backed registry: MLflow's twin for a laptop and for tests, under the same contract."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fednested_lib.blobs import BlobStore, write_durable
from fednested_lib.errors import GovernanceError, SnapshotError, StorageError
from fednested_lib.signing import canonical_json
from tier1.governance.ports import ModelVersion, Registered, TrainingRun
from tier1.governance.registry import RepairableRegistry

EMPTY: dict[str, Any] = {"anchor": None, "aliases": {}, "entries": []}


class FileRegistry(RepairableRegistry):
    """Versions, aliases and anchor in one JSON file, artifacts beside it.

    Args:
        path: the JSON file, e.g. ``home/registry.json``; artifacts go to the directory of the same stem.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._artifacts = BlobStore(self.path.with_suffix(""))

    def register(self, version: ModelVersion) -> Registered:
        """Store a version unless an entry with its manifest is there."""
        known = (entry for entry in self.versions() if entry.manifest_digest == version.manifest_digest)
        return next(known, None) or self.add(version)

    def versions(self) -> tuple[Registered, ...]:
        """Return all registered versions, oldest first."""
        return tuple(_registered(entry) for entry in self._read()["entries"])

    def aliases(self) -> Mapping[str, str]:
        """Return alias → registry number."""
        return self._read()["aliases"]

    def anchor(self) -> str | None:
        """Return the remembered chain head."""
        return self._read()["anchor"]

    def artifacts(self, registered: Registered) -> Mapping[str, bytes]:
        """Return the stored files of an entry that are there and undamaged."""
        found = {}
        for entry in self._read()["entries"]:
            if entry["number"] == registered.number:
                for name, digest in entry["files"].items():
                    with contextlib.suppress(SnapshotError):
                        found[name] = self._artifacts.get(digest)
        return found

    def add(self, version: ModelVersion) -> Registered:
        """Store a version in a new entry."""
        contents = {"manifest.json": version.manifest, "snapshot.json": version.snapshot}
        files = {name: self._artifacts.put(data) for name, data in contents.items()}
        with self._changing() as document:
            number = str(1 + max((int(entry["number"]) for entry in document["entries"]), default=0))
            entry = {
                "number": number,
                "tags": version.tags() | {"chain_head": version.chain_head},
                "losses": dict(version.losses),
                "metrics": dict(version.metrics),
                "files": files,
            }
            document["entries"].append(entry)
        return _registered(entry)

    def point(self, alias: str, number: str | None) -> None:
        """Let an alias point at an entry; None removes it."""
        with self._changing() as document:
            if number is None:
                document["aliases"].pop(alias, None)
            else:
                document["aliases"][alias] = number

    def set_tags(self, number: str, tags: Mapping[str, str]) -> None:
        """Set tags of an entry, leaving its other tags alone."""
        with self._changing() as document:
            for entry in document["entries"]:
                if entry["number"] == number:
                    entry["tags"].update(tags)

    def set_anchor(self, digest: str) -> None:
        """Remember a chain head."""
        with self._changing() as document:
            document["anchor"] = digest

    def record_run(self, run: TrainingRun) -> None:
        """Keep the metrics of a run in a file of its own, ``<stem>.runs/<update id>.json``."""
        place = self.path.with_suffix(".runs") / f"{run.update_id}.json"
        write_durable(place, canonical_json({"name": run.name, **run.tags(), "steps": list(run.steps)}))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """Hold the registry alone, from reading it to writing it back."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(self.path.with_suffix(".lock"), "ab")  # noqa: SIM115 - closed by the with below
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path} ({error.strerror}): fix the path or its permissions"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            document = self._read()
            yield document
            write_durable(self.path, canonical_json(document))

    def _read(self) -> dict[str, Any]:
        try:
            document = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return json.loads(canonical_json(EMPTY))
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read ({error.strerror}): fix its permissions") from error
        except ValueError:
            document = None
        if not isinstance(document, dict) or set(document) != set(EMPTY):
            raise GovernanceError(f"{self.path} is not a registry: delete it, the next repair makes it anew")
        return document


def _registered(entry: Mapping[str, Any]) -> Registered:
    number = entry["number"]
    return Registered(
        platform="file", number=number, run_id=f"file-{number}", source=f"file:{number}", tags=entry["tags"]
    )

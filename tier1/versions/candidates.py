"""Candidates on disk: what was folded and waits for its gate, named by the digest of its manifest.

Durable before anything is decided about it, so that a gate result, a deck or a second process can refer to it.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from fednested_lib.blobs import write_durable
from fednested_lib.errors import ChainCorrupt, ChainError
from fednested_lib.failpoints import failpoint
from fednested_lib.signing import sha256_hex
from fednested_lib.snapshot import SnapshotManifest
from tier1.versions.manifest import Candidate


def save_candidate(home: str | os.PathLike, candidate: Candidate) -> str:
    """Store a candidate durably under `home` and return its digest; storing it again changes nothing.

    Raises:
        StorageError: the disk is full.
    """
    data = candidate.to_bytes()
    digest = sha256_hex(data)
    write_durable(_path(home, digest), data)
    failpoint("fold.after_candidate")
    return digest


def load_candidate(home: str | os.PathLike, digest: str) -> Candidate:
    """Read and verify a candidate.

    Raises:
        ChainError: there is none of this digest.
        ChainCorrupt: its bytes were altered.
    """
    path = _path(home, digest)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ChainError(
            f"candidate {digest[:12]} cannot be read at {path} ({error.strerror}): fold it again"
        ) from error
    if sha256_hex(data) != digest:
        raise ChainCorrupt(f"candidate {digest[:12]} at {path} was altered: delete it and fold again")
    try:
        return Candidate.model_validate_json(data)
    except ValidationError as error:
        raise ChainCorrupt(f"candidate {digest[:12]} at {path} is not one of this release: fold it again") from error


def snapshot_of(candidate: Candidate) -> SnapshotManifest:
    """Return what a candidate would make of its parent, as a snapshot."""
    return SnapshotManifest(
        version=candidate.parent_version,
        family=candidate.family,
        model_config=candidate.model,
        tokenizer=candidate.tokenizer,
        blobs=candidate.blobs,
    )


def newest_first(home: str | os.PathLike) -> list[str]:
    """Return the digests of all stored candidates, the one stored last first."""
    files = [path for path in (Path(home) / "candidates").glob("*.json") if len(path.stem) == 64]
    return [path.stem for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.stem), reverse=True)]


def _path(home: str | os.PathLike, digest: str) -> Path:
    return Path(home) / "candidates" / f"{digest}.json"

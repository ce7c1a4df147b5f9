"""Give a version to whoever has no federation: transformers, another chain's genesis, a server of models."""

from __future__ import annotations

from pathlib import Path

from fednested_lib.errors import ChainError
from tier1.federation import Federation
from tier1.versions.model_export import export_model


def export_version(fed: Federation, directory: Path, version: int | None = None, *, shard_gb: float = 5.0) -> int:
    """Write a version as transformers reads it and return its number.

    Args:
        fed: the federation.
        directory: must not exist.
        version: which; None is the champion.
        shard_gb: most gigabytes of one file.

    Raises:
        ChainError: the chain has no such version.
        ConfigError: `directory` exists.
        SnapshotError: a blob is missing or corrupt; `fednested tier1 replay` puts it back.
        StorageError: `directory` cannot be written; nothing is left of it.
    """
    state = fed.chain.state()
    if version is not None and version not in state.versions:
        raise ChainError(f"version must be 0..{max(state.versions)}, got {version}: see `fednested tier1 status`")
    view = state.champion if version is None else state.versions[version]
    export_model(view, fed.blobs, directory, shard_gb=shard_gb)
    return view.version

"""A version as transformers reads it: a directory with its configuration, its tokenizer and sharded safetensors.

Written beside its place and renamed when all of it is on the disk: a directory that exists is whole. `fednested.json`
says which version it is, and by what digest the chain knows it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from safetensors import SafetensorError

from fednested_lib.blobs import BlobStore, fsync_path
from fednested_lib.errors import ConfigError, StorageError
from fednested_lib.signing import canonical_json
from fednested_lib.snapshot import build_model
from fednested_lib.text import END_OF_TEXT, load_tokenizer
from tier1.versions.state import VersionView

ABOUT_FILE = "fednested.json"


def tokenizer_files(tokenizer: bytes) -> dict[str, bytes]:
    """Return file name → bytes for `AutoTokenizer` of transformers.

    A family's own tokenizer class would cut text otherwise than `tokenizer.json`: the general one is named.
    """
    read = load_tokenizer(tokenizer)
    ends = [token for token in END_OF_TEXT if read.token_to_id(token) is not None]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **({"eos_token": ends[0]} if ends else {})}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": canonical_json(config)}


def export_model(view: VersionView, blobs: BlobStore, directory: Path, *, shard_gb: float = 5.0) -> None:
    """Write a version in fp32, to the bit, for `from_pretrained` of transformers and for `model.pretrained`.

    Args:
        view: The version.
        blobs: Holds its slices.
        directory: Must not exist.
        shard_gb: Most gigabytes (10⁹ bytes) of one file, > 0; a weight that is larger has a file of its own.

    Raises:
        ConfigError: ``directory`` exists.
        SnapshotError: A blob is missing or corrupt.
        StorageError: ``directory`` cannot be written; nothing is left of it.
    """
    if directory.exists():
        raise ConfigError(f"{directory} exists: give --out a directory that does not")
    unfinished = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    model = build_model(view.snapshot, blobs)
    about = {"version": view.version, "entry": view.digest, "base_digest": view.base_digest}
    try:
        model.save_pretrained(unfinished, max_shard_size=int(shard_gb * 1e9))
        for name, data in tokenizer_files(blobs.get(view.tokenizer)).items():
            (unfinished / name).write_bytes(data)
        (unfinished / ABOUT_FILE).write_bytes(canonical_json(about))
        for path in (*unfinished.iterdir(), unfinished):
            fsync_path(path)
        os.rename(unfinished, directory)
        fsync_path(directory.parent)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise StorageError(f"cannot write {directory} ({reason}): free space or fix its permissions") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

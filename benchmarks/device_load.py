"""Load a snapshot and print the peak memory that takes: `python -m benchmarks.device_load STORE DIGEST FORM`.

STORE is a directory of blobs, DIGEST that of the manifest, FORM how the experts are held. Peak is the high-water mark
of the resident set above its value after imports, in bytes; run it in a fresh process, whose heap has not grown yet.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers.models.mixtral.modeling_mixtral  # noqa: F401  its import is not part of loading

import fednested_lib.adapters  # noqa: F401  likewise
from benchmarks.fold_memory import status_bytes
from fednested_lib.blobs import BlobStore
from fednested_lib.snapshot import Frozen, SnapshotManifest, build_model


def main(directory: str, digest: str, form: Frozen) -> None:
    """Measure and print."""
    store = BlobStore(directory)
    manifest = SnapshotManifest.from_json(store.get(digest))
    imported = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    build_model(manifest, store, experts="fednested_lora", frozen=form)
    print(status_bytes("VmHWM") - imported)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Loss of a version on a registered suite, measured once per weights and suite and kept.

The key of a measurement is everything it depends on: weights, tokenizer, suite bytes, row length and token cap. So a
gate, a report and a registry entry show the same figures, a second look costs nothing, and suites may be measured on
different machines: the gate finds what is there and measures what is missing.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from fednested_lib.blobs import BlobStore, write_durable
from fednested_lib.signing import canonical_json, sha256_hex
from fednested_lib.snapshot import SnapshotManifest, build_model
from tier1.evaluation.suites import Suite, SuiteResult, evaluate


def measure_snapshot(
    snapshot: SnapshotManifest,
    suites: dict[str, Suite],
    blobs: BlobStore,
    *,
    seq_len: int,
    max_tokens: int,
    reports: Path,
) -> dict[str, SuiteResult]:
    """Measure a snapshot on every suite, or read the measurement.

    Args:
        snapshot: weights to measure.
        suites: registered suites by name.
        blobs: holds the weights and the tokenizer.
        seq_len: predicted tokens per row.
        max_tokens: most tokens per suite.
        reports: directory of kept measurements.

    Raises:
        SnapshotError: a blob is missing or corrupt.
        DataError: a suite is unusable.
    """
    places = {
        name: reports / f"{_key(snapshot, suite, seq_len=seq_len, max_tokens=max_tokens)}.json"
        for name, suite in suites.items()
    }
    missing = {name: suite.path for name, suite in suites.items() if not places[name].exists()}
    measured = {}
    if missing:
        tokenizer = blobs.get(snapshot.tokenizer)
        model = build_model(snapshot, blobs)
        measured = evaluate(model, missing, tokenizer, seq_len=seq_len, max_tokens=max_tokens)
    for name, result in measured.items():
        # JSON has no NaN: a model that diverged is measured again, its loss is in no report.
        if result.nats_per_token < float("inf"):
            write_durable(places[name], canonical_json(asdict(result)))
    return {name: measured[name] if name in missing else _read(places[name]) for name in suites}


def _key(snapshot: SnapshotManifest, suite: Suite, *, seq_len: int, max_tokens: int) -> str:
    return sha256_hex(canonical_json([snapshot.digest, suite.digest, seq_len, max_tokens]))


def _read(path: Path) -> SuiteResult:
    return SuiteResult(**json.loads(path.read_bytes()))

"""Losses of a version on every registered suite, measured once per weights and suites and kept.

The key of a measurement is everything it depends on: weights, tokenizer, suite bytes, row length and token cap. So a
gate, a report and a registry entry show the same figures, and a second look costs nothing.
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
    key = sha256_hex(
        canonical_json([snapshot.digest, {name: suite.digest for name, suite in suites.items()}, seq_len, max_tokens])
    )
    path = reports / f"{key}.json"
    if path.exists():
        return {name: SuiteResult(**row) for name, row in json.loads(path.read_bytes()).items()}
    paths = {name: suite.path for name, suite in suites.items()}
    results = evaluate(
        build_model(snapshot, blobs), paths, blobs.get(snapshot.tokenizer), seq_len=seq_len, max_tokens=max_tokens
    )
    # JSON has no NaN: a model that diverged is measured again, its loss is in no report.
    if all(result.nats_per_token < float("inf") for result in results.values()):
        write_durable(path, canonical_json({name: asdict(result) for name, result in results.items()}))
    return results

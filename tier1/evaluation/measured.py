"""What a version does on a registered suite, measured once per weights and suite and kept.

The key of a measurement is everything it depends on: weights, tokenizer, suite bytes, row length and token cap, and the
form in which it is kept, so that one that an earlier release kept is measured again. So a
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

FORM = 2  # since the figures of each row


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
    digests = {name: suite.digest for name, suite in suites.items()}
    places = _places(snapshot, digests, seq_len=seq_len, max_tokens=max_tokens, reports=reports)
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


def kept(
    snapshot: SnapshotManifest, digests: dict[str, str], *, seq_len: int, max_tokens: int, reports: Path
) -> dict[str, SuiteResult]:
    """Return the measurements of a snapshot that are there, by suite name; `digests` are those of the suites.

    It measures nothing, so it needs neither torch nor weights.
    """
    places = _places(snapshot, digests, seq_len=seq_len, max_tokens=max_tokens, reports=reports)
    return {name: _read(place) for name, place in places.items() if place.exists()}


def _places(
    snapshot: SnapshotManifest, digests: dict[str, str], *, seq_len: int, max_tokens: int, reports: Path
) -> dict[str, Path]:
    def key(suite: str) -> str:
        return sha256_hex(canonical_json([FORM, snapshot.digest, suite, seq_len, max_tokens]))

    return {name: reports / f"{key(digest)}.json" for name, digest in digests.items()}


def _read(path: Path) -> SuiteResult:
    return SuiteResult(**json.loads(path.read_bytes()))

"""Tier-1 text becomes packed tokens: JSONL → validated records → one token stream → rows of equal length.

Records stream through in batches, each checked against a schema; a bad one is set aside with file, line and reason
(never its value) and does not stop the rest. The packed rows are cached under a digest of everything they depend on:
the bytes of the files, the tokenizer, the row length and the version of this module's rules.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fednested_lib.blobs import write_durable
from fednested_lib.errors import DataError, StorageError
from fednested_lib.signing import canonical_json, sha256_hex
from fednested_lib.text import BadRow, Row, end_of_text_id, load_tokenizer, read_jsonl

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RULES_VERSION = 1
BATCH_RECORDS = 512
CHUNK_ROWS = 1024
ABANDONED_S = 3600
SET_ASIDE_FILE = "set_aside.jsonl"
_REMEDY = 'give one {"text": …} or {"prompt": …, "completion": …} per line'


@dataclass(frozen=True, kw_only=True)
class PackedDataset:
    """Packed tokens on disk.

    Args:
        path: ``.npy`` of int32 [n_rows, seq_len + 1]; row i starts with the last token of row i − 1.
        digest: Content hash of the inputs, recorded with what is trained on them.
        n_rows: Rows.
        n_tokens: Predicted tokens, n_rows · seq_len.
        n_bytes: UTF-8 bytes of the accepted texts.
        n_set_aside: Records that were not accepted.
    """

    path: Path
    digest: str
    n_rows: int
    n_tokens: int
    n_bytes: int
    n_set_aside: int

    def tokens(self) -> np.ndarray:
        """Open the rows, memory-mapped."""
        return np.load(self.path, mmap_mode="r", allow_pickle=False)


def prepare_dataset(sources: Mapping[str, Path], tokenizer: bytes, *, seq_len: int, out_dir: Path) -> PackedDataset:
    """Validate and pack the records of all sources; a second call with the same inputs reads the cache.

    Args:
        sources: Dataset name → JSONL file; packed in the order of the names.
        tokenizer: Bytes of ``tokenizer.json``.
        seq_len: Predicted tokens per row.
        out_dir: Receives ``<digest>.npy``, ``<digest>.json`` and ``set_aside.jsonl``.

    Raises:
        DataError: A file is missing or empty, has no usable record, or all of them have less text than one row.
        StorageError: ``out_dir`` cannot be written.
    """
    if not sources:
        raise DataError("number of datasets must be at least 1, got 0: name a JSONL file under core.datasets")
    digest = _inputs_digest(sources, tokenizer, seq_len)
    path, summary = out_dir / f"{digest}.npy", out_dir / f"{digest}.json"
    cached = _read_summary(summary, path)
    if cached:
        _write_set_aside(out_dir, cached["set_aside"])
        return PackedDataset(path=path, digest=digest, **cached["counts"])
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        _sweep(out_dir)
        counts, set_aside = _pack(sources, load_tokenizer(tokenizer), seq_len, path)
    except OSError as error:
        raise StorageError(
            f"cannot write packed tokens to {out_dir} ({error.strerror}): free space or fix its permissions"
        ) from error
    _write_set_aside(out_dir, set_aside)
    # Written last: a summary exists only beside complete rows.
    write_durable(summary, canonical_json({"counts": counts, "set_aside": set_aside}))
    return PackedDataset(path=path, digest=digest, **counts)


def read_valid(path: Path, set_aside: list[dict]) -> Iterator[list[str]]:
    """Yield the accepted texts of one file in batches; append what is set aside to ``set_aside``.

    Args:
        path: JSONL file.
        set_aside: Receives ``{"file", "line", "reason"}`` per bad record.

    Raises:
        DataError: The file is missing, empty or without any usable record.
    """
    records, n_good, n_bad_before = read_jsonl(path), 0, len(set_aside)
    while batch := list(islice(records, BATCH_RECORDS)):
        bad = [record for record in batch if isinstance(record, BadRow)]
        good, refused = validate([record for record in batch if isinstance(record, Row)])
        in_order = sorted([*bad, *refused], key=lambda record: record.line)
        set_aside.extend({**asdict(record), "file": path.name} for record in in_order)
        n_good += len(good)
        if good:
            yield [record.text for record in good]
    if not n_good:
        first = min(set_aside[n_bad_before:], key=lambda record: record["line"])
        n_bad = len(set_aside) - n_bad_before
        raise DataError(
            f"data file {path} has 0 usable records, needs at least 1; {n_bad} set aside "
            f"(line {first['line']}: {first['reason']}): {_REMEDY}"
        )


def validate(records: Sequence[Row]) -> tuple[list[Row], list[BadRow]]:
    """Check one batch against the record schema.

    Returns:
        Accepted records in order, and the refused ones with the name of the first check that each failed.
    """
    if not records:
        return [], []
    import pandas
    import pandera.errors

    from tier1.training.schema import TextRecord

    frame = pandas.DataFrame([asdict(record) for record in records])
    try:
        TextRecord.validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as error:
        failed = error.failure_cases
    else:
        return list(records), []
    if failed["index"].isna().any():
        raise AssertionError(f"schema refuses the frame itself: {sorted(set(failed['check']))}")
    # Of the failure cases only index and check are read: the third column is the raw value.
    reason_of = dict(zip(reversed(failed["index"].tolist()), reversed(failed["check"].tolist()), strict=True))
    refused = [
        BadRow(file=record.file, line=record.line, reason=str(reason_of[i]).replace("_", " "))
        for i, record in enumerate(records)
        if i in reason_of
    ]
    return [record for i, record in enumerate(records) if i not in reason_of], refused


def _pack(sources: Mapping[str, Path], tokenizer: Tokenizer, seq_len: int, path: Path) -> tuple[dict, list[dict]]:
    """Write the rows of all sources to ``path``; return counts and what was set aside."""
    end, n_bytes, set_aside = end_of_text_id(tokenizer), 0, list[dict]()
    # The token stream goes to disk first: its length, hence the shape of the array, is known only at its end.
    stream_path, rows_path = path.with_suffix(f".{os.getpid()}.stream"), path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with stream_path.open("wb") as stream:
            for name in sorted(sources):
                for texts in read_valid(sources[name], set_aside):
                    n_bytes += sum(len(text.encode("utf-8")) for text in texts)
                    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                        stream.write(np.asarray([*encoding.ids, end], dtype=np.int32).tobytes())
        n_rows = _cut_rows(stream_path, seq_len, rows_path, source=", ".join(map(str, sources.values())))
        os.replace(rows_path, path)
    finally:
        stream_path.unlink(missing_ok=True)
        rows_path.unlink(missing_ok=True)
    counts = {"n_rows": n_rows, "n_tokens": n_rows * seq_len, "n_bytes": n_bytes, "n_set_aside": len(set_aside)}
    return counts, set_aside


def _cut_rows(stream_path: Path, seq_len: int, target: Path, *, source: str) -> int:
    n_tokens = stream_path.stat().st_size // 4
    n_rows = (n_tokens - 1) // seq_len
    if n_rows < 1:
        raise DataError(
            f"{source} has {n_tokens} tokens, needs at least {seq_len + 1} (core.seq_len + 1): "
            "add text or lower core.seq_len"
        )
    stream = np.memmap(stream_path, dtype=np.int32, mode="r")
    windows = np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::seq_len][:n_rows]
    header = {"descr": "<i4", "fortran_order": False, "shape": windows.shape}
    # Written, not mapped: on a full disk a write fails with an error, a page of a sparse mapping kills with SIGBUS.
    with target.open("wb") as rows:
        np.lib.format.write_array_header_1_0(rows, header)
        for start in range(0, n_rows, CHUNK_ROWS):
            rows.write(windows[start : start + CHUNK_ROWS].astype("<i4").tobytes())
        rows.flush()
        os.fsync(rows.fileno())
    return n_rows


def _sweep(out_dir: Path) -> None:
    """Remove what packers left that were killed; a file that is still growing belongs to one at work."""
    for path in [*out_dir.glob("*.stream"), *out_dir.glob("*.tmp")]:
        with contextlib.suppress(FileNotFoundError):  # its owner was faster
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()


def _inputs_digest(sources: Mapping[str, Path], tokenizer: bytes, seq_len: int) -> str:
    return sha256_hex(
        canonical_json(
            {
                "rules": RULES_VERSION,
                "seq_len": seq_len,
                "tokenizer": sha256_hex(tokenizer),
                "sources": {name: _file_digest(sources[name]) for name in sorted(sources)},
            }
        )
    )


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(
            f"data file {path} cannot be read ({error.strerror}): fix the path under core.datasets"
        ) from error
    return digest.hexdigest()


def _read_summary(summary: Path, rows: Path) -> dict | None:
    if not (summary.is_file() and rows.is_file()):
        return None
    return json.loads(summary.read_text(encoding="utf-8"))


def _write_set_aside(out_dir: Path, set_aside: Sequence[Mapping]) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in set_aside)
    write_durable(out_dir / SET_ASIDE_FILE, lines.encode("utf-8"))

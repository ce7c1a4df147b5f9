"""Tier-1 text becomes packed tokens: JSONL or Parquet → validated records → one token stream → rows of equal length.

Pieces of a few MiB stream through, on as many processes as fit where there is enough to do, and the rows do not depend
on their number. A bad record is set aside with dataset, file, line (Parquet: row) and reason, never its value, and
does not stop the rest. Exact duplicates are set aside too, if asked: the first of all datasets, in the order of names
and lines, stays. The rows are cached under a digest of everything they depend on: the bytes of the files, the
tokenizer, the row length, whether duplicates stay, and the version of these rules.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fednested_lib.blobs import write_durable
from fednested_lib.errors import DataError, StorageError
from fednested_lib.signing import canonical_json, sha256_hex
from fednested_lib.text import BadRow
from tier1.training.cores import processes_that_fit
from tier1.training.duplicates import Seen
from tier1.training.pieces import EncodedPiece, encode_pieces
from tier1.training.rows import RowWriter
from tier1.training.sources import Source, see, without_texts

RULES_VERSION = 3
WORTH_PROCESSES_BYTES = 32 << 20
PROCESS_BYTES = 384 << 20  # of one that encodes, its words included
ABANDONED_S = 3600
SET_ASIDE_FILE = "set_aside.jsonl"
DUPLICATE = "text is a duplicate"


@dataclass(frozen=True, kw_only=True)
class PackedDataset:
    """Packed tokens on disk.

    Args:
        path: ``.npy`` of int32 [n_rows, seq_len + 1]; row i starts with the last token of row i − 1.
        digest: Content hash of the inputs, recorded with what is trained on them.
        n_rows: Rows.
        n_tokens: Predicted tokens, n_rows · seq_len.
        n_bytes: UTF-8 bytes of the accepted texts.
        n_set_aside: Records that were not accepted, duplicates included.
        sources: Dataset name → its rows; a row that two datasets share is of the one that has more of its tokens.
        duplicates: Dataset name → its records that repeat an earlier text; none where they are not looked for.
    """

    path: Path
    digest: str
    n_rows: int
    n_tokens: int
    n_bytes: int
    n_set_aside: int
    sources: Mapping[str, range] = field(default_factory=dict)
    duplicates: Mapping[str, int] = field(default_factory=dict)

    def tokens(self) -> np.ndarray:
        """Open the rows, memory-mapped."""
        return np.load(self.path, mmap_mode="r", allow_pickle=False)


def prepare_dataset(
    sources: Mapping[str, Path],
    tokenizer: bytes,
    *,
    seq_len: int,
    out_dir: Path,
    dedupe: bool = False,
    workers: int | None = None,
) -> PackedDataset:
    """Validate and pack the records of all sources; a second call with the same inputs reads the cache.

    Args:
        sources: Dataset name → JSONL or ``*.parquet`` file; packed in the order of the names.
        tokenizer: Bytes of ``tokenizer.json``.
        seq_len: Predicted tokens per row.
        out_dir: Receives ``<digest>.npy``, ``<digest>.json`` and ``set_aside.jsonl``.
        dedupe: Whether a text that came before, in any source, is set aside.
        workers: Processes that read and encode; None: as many as fit, or this one alone for little text.

    Raises:
        DataError: A file is missing, torn or empty, has no usable record, or all have less text than one row.
        StorageError: ``out_dir`` cannot be written.
        TransportError: A process that encodes was killed.
    """
    if not sources:
        raise DataError("number of datasets must be at least 1, got 0: name a JSONL file under core.datasets")
    seen = {name: see(sources[name]) for name in sorted(sources)}
    digest = _inputs_digest(seen, tokenizer, seq_len, dedupe)
    path, summary = out_dir / f"{digest}.npy", out_dir / f"{digest}.json"
    done = _read_summary(summary, path)
    try:
        if not done:
            out_dir.mkdir(parents=True, exist_ok=True)
            _sweep(out_dir)
            done = _pack(seen, tokenizer, path, seq_len=seq_len, dedupe=dedupe, workers=workers or _workers(seen))
            # Written last: a summary exists only beside complete rows.
            write_durable(summary, canonical_json(done))
        _show_set_aside(path, seen)
    except OSError as error:
        raise StorageError(
            f"cannot write packed tokens to {out_dir} ({error.strerror}): free space or fix its permissions"
        ) from error
    rows_of = {name: range(first, end) for name, (first, end) in done["sources"].items()}
    return PackedDataset(path=path, digest=digest, **done["counts"], sources=rows_of, duplicates=done["duplicates"])


def _workers(sources: Mapping[str, Source]) -> int:
    little = sum(source.size_bytes for source in sources.values()) < WORTH_PROCESSES_BYTES
    return 1 if little else processes_that_fit(PROCESS_BYTES)


def _pack(
    sources: Mapping[str, Source], tokenizer: bytes, path: Path, *, seq_len: int, dedupe: bool, workers: int
) -> dict:
    """Write the rows of all sources to ``path`` and what is set aside beside it; return the summary."""
    seen, tally = Seen() if dedupe else None, {name: _Tally() for name in sources}
    pieces = ((name, piece) for name, source in sources.items() for piece in source.pieces())
    own = uuid.uuid4().hex  # machines that share a home may count processes alike
    rows_path, aside_path = (path.with_suffix(f".{own}.{kind}.tmp") for kind in ("rows", "aside"))
    try:
        with RowWriter(rows_path, seq_len) as rows, aside_path.open("w", encoding="utf-8") as aside:
            for name, encoded in encode_pieces(pieces, tokenizer, dedupe=dedupe, workers=workers):
                new = seen.add(encoded.digests) if seen else np.ones(len(encoded.lines), dtype=bool)
                rows.append(encoded.tokens if new.all() else encoded.tokens[np.repeat(new, encoded.counts)])
                refused = _refused(encoded, new)
                aside.writelines(json.dumps([name, bad.line, bad.reason]) + "\n" for bad in refused)
                tally[name].count(encoded, new, refused, rows.n_tokens)
            for name, source in sources.items():
                source.require_unchanged()
                if not tally[name].n_good:
                    raise without_texts(source.path, tally[name].n_set_aside, tally[name].first)
            n_rows = rows.finish(source=", ".join(str(source.path) for source in sources.values()))
        os.replace(aside_path, _set_aside_of(path))
        os.replace(rows_path, path)
    finally:
        rows_path.unlink(missing_ok=True)
        aside_path.unlink(missing_ok=True)
    counts = {
        "n_rows": n_rows,
        "n_tokens": n_rows * seq_len,
        "n_bytes": sum(one.n_bytes for one in tally.values()),
        "n_set_aside": sum(one.n_set_aside for one in tally.values()),
    }
    ends = {name: one.end for name, one in tally.items()}
    duplicates = {name: one.n_duplicates for name, one in tally.items()} if dedupe else {}
    return {"counts": counts, "sources": rows_of_sources(ends, seq_len, n_rows), "duplicates": duplicates}


@dataclass
class _Tally:
    """What one source has given so far."""

    n_good: int = 0
    n_bytes: int = 0
    n_set_aside: int = 0
    n_duplicates: int = 0
    end: int = 0
    first: BadRow | None = None

    def count(self, encoded: EncodedPiece, new: np.ndarray, refused: Sequence[BadRow], end: int) -> None:
        self.n_good += len(new)
        self.n_bytes += int(encoded.sizes[new].sum())
        self.n_set_aside += len(refused)
        self.n_duplicates += int((~new).sum())
        self.end = end
        self.first = self.first or next(iter(refused), None)


def _refused(encoded: EncodedPiece, new: np.ndarray) -> list[BadRow]:
    repeated = [BadRow(file="", line=line, reason=DUPLICATE) for line in encoded.lines[~new].tolist()]
    return sorted([*encoded.bad, *repeated], key=lambda record: record.line)


def rows_of_sources(ends: Mapping[str, int], seq_len: int, n_rows: int) -> dict[str, list[int]]:
    """Return dataset name → [first row, row after the last]: those of which most predicted tokens are its own.

    Args:
        ends: Dataset name → tokens of the stream up to its end, in the order of the stream.
        seq_len: Predicted tokens per row; row i predicts tokens i·seq_len + 1 … (i + 1)·seq_len.
        n_rows: Rows.
    """
    found, first = {}, 0
    for name, end in ends.items():
        last = min(n_rows, (2 * (end - 1) + seq_len) // (2 * seq_len))
        found[name] = [first, last]
        first = last
    return found


def _sweep(out_dir: Path) -> None:
    """Remove what packers left that were killed; a file that is still growing belongs to one at work."""
    for path in out_dir.glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # its owner was faster
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()


def _inputs_digest(sources: Mapping[str, Source], tokenizer: bytes, seq_len: int, dedupe: bool) -> str:
    return sha256_hex(
        canonical_json(
            {
                "rules": RULES_VERSION,
                "seq_len": seq_len,
                "dedupe": dedupe,
                "tokenizer": sha256_hex(tokenizer),
                "sources": {name: [source.digest, source.kind] for name, source in sources.items()},
            }
        )
    )


def _read_summary(summary: Path, rows: Path) -> dict | None:
    if not (summary.is_file() and rows.is_file() and _set_aside_of(rows).is_file()):
        return None
    return json.loads(summary.read_text(encoding="utf-8"))


def _set_aside_of(rows: Path) -> Path:
    return rows.with_suffix(f".{SET_ASIDE_FILE}")


def _show_set_aside(rows: Path, sources: Mapping[str, Source]) -> None:
    """Write what was set aside where an operator looks for it, with the files that have it now."""
    shown = rows.with_name(f"{SET_ASIDE_FILE}.{uuid.uuid4().hex}.tmp")
    try:
        with _set_aside_of(rows).open(encoding="utf-8") as kept, shown.open("w", encoding="utf-8") as out:
            for dataset, line, reason in map(json.loads, kept):
                record = {"dataset": dataset, "file": str(sources[dataset].path), "line": line, "reason": reason}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(shown, rows.with_name(SET_ASIDE_FILE))
    finally:
        shown.unlink(missing_ok=True)

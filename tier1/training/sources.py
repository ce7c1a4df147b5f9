"""Files of training text in pieces of a few MiB, which processes read side by side.

JSONL is cut at ends of lines, in the one pass over the bytes that makes the file's digest. Parquet is read by batches
of rows of its columns ``text``, or ``prompt`` and ``completion``. A piece knows the number of its first record, so that
a bad one is located whoever reads it; records are judged by the device's own rule (`fednested_lib.text`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fednested_lib.errors import DataError
from fednested_lib.text import MAX_LINE_BYTES, BadRow, Row, Unusable, read_lines, text_of

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

PIECE_BYTES = 4 << 20
MAX_PIECE_ROWS = 4096  # however small they are encoded: a dictionary has a long text once
COLUMNS = (("text",), ("prompt", "completion"))
_REMEDY = 'give one {"text": …} or {"prompt": …, "completion": …} per line'


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Bytes [begin, end) of a JSONL file: whole lines, of which the first has number `first`."""

    path: Path
    begin: int
    end: int
    first: int

    def records(self) -> Iterator[Row | BadRow]:
        """Read the records.

        Raises:
            DataError: The file cannot be read any more.
        """
        try:
            yield from read_lines(self._lines(), str(self.path), self.first)
        except OSError as error:
            raise unreadable(self.path, error.strerror) from error

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.begin)
            while file.tell() < self.end:
                # One byte more than a line may have says that it is too long; the rest of it is never held.
                line = rest = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    raise unreadable(self.path, "it became shorter meanwhile")
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(PIECE_BYTES)
                yield line


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Consecutive rows of a Parquet file, of which the first has number `first`."""

    path: Path
    batch: RecordBatch
    first: int

    def records(self) -> Iterator[Row | BadRow]:
        """Read the records."""
        names = self.batch.schema.names
        columns = [self.batch.column(name).to_pylist() for name in names]
        for number, values in enumerate(zip(*columns, strict=True), start=self.first):
            try:
                document = dict(zip(names, map(_decoded, values), strict=True))
                yield Row(file=str(self.path), line=number, text=text_of(document))
            except Unusable as error:
                yield BadRow(file=str(self.path), line=number, reason=str(error))


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file of text whose bytes have been seen once.

    Args:
        path: ``*.parquet``, or JSONL.
        digest: SHA-256 of its bytes.
        size_bytes: Their number.
        cuts: Where pieces of a JSONL file begin, each with the number of its first line.
        state: Inode, size and time of change when they were seen.
    """

    path: Path
    digest: str
    size_bytes: int
    cuts: tuple[tuple[int, int], ...]
    state: tuple[int, int, int]

    def require_unchanged(self) -> None:
        """Check that what was read since is what the digest is of.

        Raises:
            DataError: The file was written to, replaced or removed meanwhile.
        """
        try:
            state = _state(self.path.stat())
        except OSError as error:
            raise unreadable(self.path, error.strerror) from error
        if state != self.state:
            raise DataError(f"data file {self.path} was changed while it was packed: run again when it is complete")

    @property
    def kind(self) -> str:
        """Return how the bytes are read."""
        return "parquet" if self.path.suffix == ".parquet" else "jsonl"

    def pieces(self) -> Iterator[Lines | Rows]:
        """Yield the pieces in the order of the file.

        Raises:
            DataError: A Parquet file is torn, or has no text.
        """
        if self.kind == "parquet":
            yield from _batches(self.path)
            return
        ends = [begin for begin, _ in self.cuts[1:]] + [self.size_bytes]
        for (begin, first), end in zip(self.cuts, ends, strict=True):
            yield Lines(path=self.path, begin=begin, end=end, first=first)


def see(path: Path) -> Source:
    """Read a file once, for its digest and the places to cut it.

    Raises:
        DataError: It cannot be read.
    """
    digest, size, n_lines, cuts = hashlib.sha256(), 0, 0, [(0, 1)]
    try:
        with path.open("rb") as file:
            state = _state(os.fstat(file.fileno()))
            while chunk := file.read(PIECE_BYTES):
                digest.update(chunk)
                if last := chunk.rfind(b"\n") + 1:
                    n_lines += chunk.count(b"\n")
                    cuts.append((size + last, n_lines + 1))
                size += len(chunk)
    except OSError as error:
        raise unreadable(path, error.strerror) from error
    return Source(path=path, digest=digest.hexdigest(), size_bytes=size, cuts=tuple(cuts), state=state)


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def texts_of(path: Path) -> Iterator[str]:
    """Yield the texts of a file, a piece in memory at a time; bad records are passed over.

    Raises:
        DataError: It cannot be read, or has no usable record.
    """
    n_texts, n_bad, first = 0, 0, None
    for piece in see(path).pieces():
        for record in piece.records():
            if isinstance(record, Row):
                n_texts += 1
                yield record.text
            else:
                n_bad, first = n_bad + 1, first or record
    if not n_texts:
        raise without_texts(path, n_bad, first)


def without_texts(path: Path, n_bad: int, first: BadRow | None) -> DataError:
    """Say that a file has no usable record, how many bad ones, and what is wrong with the first."""
    if first is None:
        return DataError(f"data file {path} is empty: {_REMEDY}")
    return DataError(
        f"data file {path} has 0 usable records, needs at least 1; {n_bad} set aside "
        f"(line {first.line}: {first.reason}): {_REMEDY}"
    )


def unreadable(path: Path, why: str | None) -> DataError:
    """Say that a file cannot be read."""
    return DataError(f"data file {path} cannot be read ({why}): fix the path under core.datasets")


def _batches(path: Path) -> Iterator[Rows]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    first = 1
    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            columns = _columns_of(path, file)
            for group in range(file.num_row_groups):
                sizes = file.metadata.row_group(group)
                n_rows = max(1, min(MAX_PIECE_ROWS, PIECE_BYTES * sizes.num_rows // max(1, sizes.total_byte_size)))
                for batch in file.iter_batches(n_rows, row_groups=[group], columns=columns, use_threads=False):
                    for piece in _halved(_as_bytes(batch)):
                        yield Rows(path=path, batch=piece, first=first)
                        first += piece.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"data file {path} cannot be read as Parquet after row {first - 1} ({type(error).__name__}): "
            "write it again, or name JSONL files .jsonl"
        ) from error


def _halved(batch: RecordBatch) -> Iterator[RecordBatch]:
    """Cut rows that are more than a piece holds."""
    if batch.nbytes <= PIECE_BYTES or batch.num_rows < 2:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _halved(batch.slice(0, half))
    yield from _halved(batch.slice(half))


def _columns_of(path: Path, file: ParquetFile) -> list[str]:
    import pyarrow

    kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    found = [(field.name, field.type) for field in file.schema_arrow]
    for columns in COLUMNS:
        if all([kind in kinds for name, kind in found if name == column] == [True] for column in columns):
            return list(columns)
    raise DataError(
        f"data file {path} must have one column text, or prompt and completion, of strings, got "
        f"{', '.join(f'{name} ({kind})' for name, kind in found) or 'none'}: rename or convert its columns"
    )


def _as_bytes(batch: RecordBatch) -> RecordBatch:
    """Return the columns as bytes: as strings, one that is not UTF-8 would end the batch."""
    import pyarrow

    columns: Mapping = {name: batch.column(name).cast(pyarrow.large_binary()) for name in batch.schema.names}
    return pyarrow.RecordBatch.from_pydict(columns)


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        raise Unusable("not UTF-8") from None

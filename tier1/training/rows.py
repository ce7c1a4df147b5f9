"""A stream of tokens becomes a ``.npy`` of rows of equal length, without a second pass and with one piece in memory.

Row i holds tokens i·seq_len … (i + 1)·seq_len, so that rows overlap by one token; the rest at the end is dropped.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np

from fednested_lib.errors import DataError

CHUNK_ROWS = 1024


class RowWriter:
    """Writes rows as tokens come.

    Args:
        path: Receives int32 [n_rows, seq_len + 1].
        seq_len: Predicted tokens per row, ≥ 1.
    """

    def __init__(self, path: Path, seq_len: int) -> None:
        self.n_tokens, self._seq_len, self._n_rows = 0, seq_len, 0
        self._left = np.empty(0, dtype=np.int32)
        self._file = path.open("wb")
        self._write_header()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *failed: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def append(self, tokens: np.ndarray) -> None:
        """Write the rows that int32 [n] more tokens complete.

        Raises:
            OSError: The disk is full.
        """
        self.n_tokens += len(tokens)
        stream = np.concatenate([self._left, tokens])
        n = max(0, (len(stream) - 1) // self._seq_len)
        self._left = stream[n * self._seq_len :].copy()
        if not n:
            return
        # Written, not mapped: on a full disk a write is an error, a page of a sparse map a SIGBUS.
        windows = np.lib.stride_tricks.sliding_window_view(stream, self._seq_len + 1)[:: self._seq_len]
        for start in range(0, n, CHUNK_ROWS):
            self._file.write(windows[start : start + CHUNK_ROWS].astype("<i4").tobytes())
        self._n_rows += n

    def finish(self, *, source: str) -> int:
        """Make the file whole and durable; return the number of rows.

        Args:
            source: Where the tokens come from, named in the error.

        Raises:
            DataError: There is less than one row.
            OSError: The disk is full.
        """
        if not self._n_rows:
            raise DataError(
                f"{source} has {self.n_tokens} tokens, needs at least {self._seq_len + 1} (core.seq_len + 1): "
                "add text or lower core.seq_len"
            )
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._n_rows

    def _write_header(self) -> None:
        # NumPy pads it so that it has one length for every number of rows.
        header = {"descr": "<i4", "fortran_order": False, "shape": (self._n_rows, self._seq_len + 1)}
        np.lib.format.write_array_header_1_0(self._file, header)

"""Decoded factors of many updates on disk, so that a fold holds one expert at a time whatever their number.

Updates arrive one by one and hold all experts; the fold walks expert by expert and needs all updates. A spool turns the
one order into the other: one flat fp32 file in a scratch directory, read by slices and removed at the end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from fednested_lib.delta import Delta
from fednested_lib.errors import StorageError


class FactorSpool:
    """Scratch files of decoded factors; a context manager.

    Args:
        directory: parent of the scratch directory; the system's temporary directory by default.
    """

    def __init__(self, directory: str | None = None):
        self._parent = directory
        self._places: dict[tuple[str, str, int], tuple[int, int, int, int]] = {}  # -> offset, r, d_out, d_in
        self._offset = 0  # of the next update, in bytes

    def __enter__(self) -> FactorSpool:
        try:
            self._directory = Path(tempfile.mkdtemp(prefix="fednested-fold-", dir=self._parent))
            self._file = open(self._directory / "factors", "w+b", buffering=0)
        except OSError as error:
            raise StorageError(f"no scratch directory in {error.filename} ({error.strerror}): set TMPDIR") from error
        return self

    def __exit__(self, *_exception) -> None:
        self._file.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def add(self, update_id: str, delta: Delta) -> None:
        """Write the factors of one update.

        Raises:
            StorageError: the scratch directory is full.
        """
        offset = self._offset
        try:
            for param, factors in delta.factors.items():
                n, rank, d_in = factors.lora_a.shape
                d_out = factors.lora_b.shape[1]
                flat = np.concatenate(
                    [factors.lora_a.reshape(n, -1), factors.lora_b.reshape(n, -1)], 1, dtype=np.float32
                )
                for i, expert in enumerate(factors.expert_ids):
                    self._places[update_id, param, expert] = (offset + i * flat[i].nbytes, rank, d_out, d_in)
                offset += self._write(flat, offset)
        except OSError as error:
            raise StorageError(
                f"cannot spool {delta.size_fp32_bytes} bytes to {self._file.name} ({error.strerror}): free space there"
            ) from error
        self._offset = offset

    def read(self, update_id: str, param: str, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (A [r, d_in], B [d_out, r]) of one expert matrix, fp32."""
        offset, rank, d_out, d_in = self._places[update_id, param, expert]
        flat = np.empty(rank * (d_in + d_out), dtype=np.float32)
        # Read, not mapped: pages of a mapping stay resident and would grow with the number of clients.
        n = os.preadv(self._file.fileno(), [flat.view(np.uint8)], offset)
        if n != flat.nbytes:
            raise StorageError(
                f"spool {self._file.name} was cut short at {offset + n} bytes: free space there, fold again"
            )
        return flat[: rank * d_in].reshape(rank, d_in), flat[rank * d_in :].reshape(d_out, rank)

    def _write(self, array: np.ndarray, offset: int) -> int:
        data, written = memoryview(array).cast("B"), 0
        while written < len(data):
            written += os.pwrite(self._file.fileno(), data[written:], offset + written)
        return written

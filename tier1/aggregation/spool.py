"""Decoded factors of many updates on disk, so that a fold holds one expert at a time whatever their number.

Updates arrive one by one and hold all experts; the fold walks expert by expert and needs all updates. A spool turns the
one order into the other: one flat fp32 file per update in a scratch directory, read by slices and removed at the end.
"""

from __future__ import annotations

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
        self._files: dict[str, np.memmap] = {}

    def __enter__(self) -> FactorSpool:
        try:
            self._directory = Path(tempfile.mkdtemp(prefix="fednested-fold-", dir=self._parent))
        except OSError as error:
            raise StorageError(f"no scratch directory in {error.filename} ({error.strerror}): set TMPDIR") from error
        return self

    def __exit__(self, *_exception) -> None:
        self._files.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def add(self, update_id: str, delta: Delta) -> None:
        """Write the factors of one update.

        Raises:
            StorageError: the scratch directory is full.
        """
        path = self._directory / update_id
        offset = 0  # in fp32 elements
        try:
            with open(path, "wb") as file:
                for param, factors in delta.factors.items():
                    _, rank, d_in = factors.lora_a.shape
                    d_out = factors.lora_b.shape[1]
                    for i, expert in enumerate(factors.expert_ids):
                        self._places[update_id, param, expert] = (offset, rank, d_out, d_in)
                        for array in (factors.lora_a[i], factors.lora_b[i]):
                            file.write(np.ascontiguousarray(array, dtype=np.float32).data)
                        offset += rank * (d_in + d_out)
        except OSError as error:
            raise StorageError(
                f"cannot spool {delta.size_fp32_bytes} bytes to {path} ({error.strerror}): free space there"
            ) from error
        self._files[update_id] = np.memmap(path, dtype=np.float32, mode="r")

    def read(self, update_id: str, param: str, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (A [r, d_in], B [d_out, r]) of one expert matrix, fp32."""
        offset, rank, d_out, d_in = self._places[update_id, param, expert]
        middle, end = offset + rank * d_in, offset + rank * (d_in + d_out)
        flat = self._files[update_id]
        return flat[offset:middle].reshape(rank, d_in), flat[middle:end].reshape(d_out, rank)

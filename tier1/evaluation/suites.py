"""Held-out suites: one per domain, measured as nats per token and bits per byte.

    nats per token = −(1/N) Σ log p(token_i | tokens before it in its row),    bits per byte = nats · N / (bytes · ln 2)

Bits per byte compare models with different tokenizers. Every row has the same length, so no padding enters a mean, and
rows go through the model in batches of a fixed size: the result does not depend on a setting. A suite with more tokens
than allowed is thinned to evenly spaced rows, the same ones every time.

A registered suite stays: a gate that could drop or rewrite a suite could hide what was forgotten.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fednested_lib.blobs import create_exclusive, write_durable
from fednested_lib.errors import ConfigError, DataError, TrainingError
from fednested_lib.signing import canonical_json, sha256_hex
from fednested_lib.text import end_of_text_id, load_tokenizer, pack, read_texts

if TYPE_CHECKING:
    from torch import nn

BATCH_ROWS = 32
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A registered suite: its name, its JSONL file and the digest of that file's bytes."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True, kw_only=True)
class PackedSuite:
    """A suite as token rows int32 [n, seq_len + 1], and how many UTF-8 bytes their predicted tokens stand for."""

    tokens: np.ndarray
    n_bytes: float


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """Loss of one model on one suite; not finite if the model's output is not."""

    nats_per_token: float
    bits_per_byte: float
    n_tokens: int
    n_bytes: int


class SuiteRegistry:
    """The suites of a federation, kept below ``root``: ``<name>.json`` (written once) and ``<digest>.jsonl``."""

    def __init__(self, root: Path):
        self._root = Path(root)

    def register(self, suites: Mapping[str, Path]) -> None:
        """Register suites; one that is registered with the same content is left alone.

        Args:
            suites: Suite name → JSONL file; the file is copied.

        Raises:
            ConfigError: A name is malformed, or registered with other content.
            DataError: A file is missing, empty or has no usable record.
        """
        for name, path in suites.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"suite name must match {_NAME.pattern}, got {name!r}: rename it in evaluation.suites"
                )
            read_texts(path)
            data = Path(path).read_bytes()
            digest = sha256_hex(data)
            write_durable(self._root / f"{digest}.jsonl", data)
            if not create_exclusive(self._entry(name), canonical_json({"name": name, "digest": digest})):
                self._refuse_change(name, digest, path)

    def suites(self) -> dict[str, Suite]:
        """Return every suite that was ever registered, by name.

        Raises:
            DataError: The copy of a suite is missing or was altered.
        """
        return {name: self.suite(name) for name in self.names()}

    def names(self) -> list[str]:
        """Return the names of all registered suites, sorted, without a look at their copies."""
        return sorted(json.loads(path.read_bytes())["name"] for path in self._root.glob("*.json"))

    def suite(self, name: str) -> Suite:
        """Return one registered suite.

        Raises:
            DataError: Its copy is missing or was altered.
        """
        return self._open(name, json.loads(self._entry(name).read_bytes())["digest"])

    def _entry(self, name: str) -> Path:
        return self._root / f"{name}.json"

    def _refuse_change(self, name: str, digest: str, path: Path) -> None:
        known = json.loads(self._entry(name).read_bytes())["digest"]
        if known != digest:
            raise ConfigError(
                f"suite {name!r} is registered with digest {known[:12]}, {path} has {digest[:12]}: "
                "a registered suite stays; register the new content under another name"
            )

    def _open(self, name: str, digest: str) -> Suite:
        path = self._root / f"{digest}.jsonl"
        found = sha256_hex(path.read_bytes()) if path.is_file() else "no file"
        if found != digest:
            raise DataError(
                f"suite {name!r} must have digest {digest[:12]}, {path} has {found[:12]}: restore that file"
            )
        return Suite(name=name, path=path, digest=digest)


def evaluate(
    model: nn.Module, suites: Mapping[str, Path], tokenizer: bytes, *, seq_len: int, max_tokens: int
) -> dict[str, SuiteResult]:
    """Measure a model on every suite.

    Args:
        model: In evaluation mode; left as it is.
        suites: Suite name → JSONL file.
        tokenizer: Bytes of the snapshot's ``tokenizer.json``.
        seq_len: Predicted tokens per row.
        max_tokens: Most tokens per suite; at least one row is used.

    Raises:
        DataError: A suite is missing, empty or shorter than one row.
    """
    return {
        name: measure(model, pack_suite(path, tokenizer, seq_len=seq_len, max_tokens=max_tokens))
        for name, path in suites.items()
    }


def pack_suite(path: Path, tokenizer: bytes, *, seq_len: int, max_tokens: int) -> PackedSuite:
    """Tokenize one suite and thin it to at most ``max_tokens``.

    Raises:
        DataError: The file is missing, empty or shorter than one row.
    """
    texts, _ = read_texts(path)
    encoder = load_tokenizer(tokenizer)
    rows = pack(texts, encoder, seq_len, source=path, key="evaluation.seq_len")
    chosen = rows[evenly_spaced(len(rows), max(1, max_tokens // seq_len))]
    text_tokens = int((rows[:, 1:] != end_of_text_id(encoder)).sum())
    chosen_tokens = int((chosen[:, 1:] != end_of_text_id(encoder)).sum())
    n_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return PackedSuite(tokens=chosen, n_bytes=n_bytes * chosen_tokens / max(1, text_tokens))


def measure(model: nn.Module, suite: PackedSuite) -> SuiteResult:
    """Measure a model on one packed suite; a loss that is not finite is NaN, which the gate fails."""
    from fednested_lib.training import mean_loss

    try:
        nats, n_tokens = mean_loss(model, suite.tokens, BATCH_ROWS)
    except TrainingError:
        nats, n_tokens = math.nan, suite.tokens[:, 1:].size
    return SuiteResult(
        nats_per_token=nats,
        bits_per_byte=nats * n_tokens / (suite.n_bytes * math.log(2)),
        n_tokens=n_tokens,
        n_bytes=round(suite.n_bytes),
    )


def evenly_spaced(n_rows: int, n_wanted: int) -> np.ndarray:
    """Return ``min(n_rows, n_wanted)`` different row numbers, evenly spaced from the first on."""
    n_wanted = min(n_rows, n_wanted)
    return np.arange(n_wanted) * n_rows // n_wanted

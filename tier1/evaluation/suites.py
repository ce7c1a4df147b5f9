"""Held-out suites: one per domain, measured as nats per token, bits per byte and the share of right guesses.

    nats per token = −(1/N) Σ log p(token_i | tokens before it in its row),    bits per byte = nats · N / (bytes · ln 2)
    perplexity = exp(nats per token),    accuracy = #{i : token_i is the model's first choice} / N

A suite of prompts and completions has a task accuracy besides (`completions.py`). Bits per byte compare models with
different tokenizers. Every row has the same length, so no padding enters a mean, and
rows go through the model in batches of a fixed size: the result does not depend on a setting. A suite with more tokens
than allowed is thinned to evenly spaced rows, the same ones every time.

A registered suite stays: a gate that could drop or rewrite a suite could hide what was forgotten.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fednested_lib.blobs import create_exclusive, write_durable
from fednested_lib.errors import ConfigError, DataError
from fednested_lib.signing import canonical_json, sha256_hex
from fednested_lib.text import Row, end_of_text_id, load_tokenizer, pack, read_jsonl, read_texts
from tier1.evaluation.completions import exact_matches, pack_pairs, read_pairs

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
    """A suite as a model reads it.

    Args:
        tokens: rows int32 [n, seq_len + 1].
        lines: the line of the suite's file in which each row begins, [n]; too far where a text before it spells out
            the end-of-text token.
        n_bytes: UTF-8 bytes that the predicted tokens stand for.
        pairs: (given, wanted) of `completions.pack_pairs`, maybe of no row.
    """

    tokens: np.ndarray
    lines: np.ndarray
    n_bytes: float
    pairs: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What one model does on one suite; loss not finite if the model's output is not.

    Args:
        nats_per_token: mean loss.
        bits_per_byte: likewise, whatever the tokenizer.
        n_tokens: predicted tokens.
        n_bytes: that they stand for.
        rows: SHA-256 of the token rows; two results compare row by row if it is equal. Empty: no rows are known.
        lines: where each row begins in the suite's file.
        row_nats: loss of each row, nats per token.
        row_hits: share of each row's tokens that were the model's first choice.
        completions: 1 for each completion that the model would write itself, else 0; empty for a suite without.
        routed: layer → token slots that the router gave to each expert.
    """

    nats_per_token: float
    bits_per_byte: float
    n_tokens: int
    n_bytes: int
    rows: str = ""
    lines: list[int] = field(default_factory=list)
    row_nats: list[float] = field(default_factory=list)
    row_hits: list[float] = field(default_factory=list)
    completions: list[int] = field(default_factory=list)
    routed: dict[str, list[int]] = field(default_factory=dict)


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

    def digests(self) -> dict[str, str]:
        """Return name → digest of all registered suites, sorted, without a look at their copies."""
        entries = (json.loads(path.read_bytes()) for path in self._root.glob("*.json"))
        return dict(sorted((entry["name"], entry["digest"]) for entry in entries))

    def names(self) -> list[str]:
        """Return the names of all registered suites, sorted, without a look at their copies."""
        return list(self.digests())

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
    """Tokenize one suite and thin it to at most ``max_tokens``, its completions to as many as there are rows.

    Raises:
        DataError: The file is missing, empty or shorter than one row.
    """
    records = [record for record in read_jsonl(path) if isinstance(record, Row)]
    texts = [record.text for record in records] or read_texts(path)[0]
    encoder = load_tokenizer(tokenizer)
    end = end_of_text_id(encoder)
    rows = pack(texts, encoder, seq_len, source=path, key="evaluation.seq_len")
    kept = evenly_spaced(len(rows), max(1, max_tokens // seq_len))
    ended = np.cumsum((rows[:, :-1] == end).sum(axis=1)) - (rows[:, :-1] == end).sum(axis=1)
    lines = np.array([record.line for record in records])[np.minimum(ended[kept], len(records) - 1)]
    chosen = rows[kept]
    text_tokens, chosen_tokens = (int((each[:, 1:] != end).sum()) for each in (rows, chosen))
    n_bytes = sum(len(text.encode("utf-8")) for text in texts)
    pairs = read_pairs(path)
    wanted = [pairs[i] for i in evenly_spaced(len(pairs), max(1, max_tokens // seq_len))] if pairs else []
    return PackedSuite(
        tokens=chosen,
        lines=lines,
        n_bytes=n_bytes * chosen_tokens / max(1, text_tokens),
        pairs=pack_pairs(wanted, tokenizer, seq_len=seq_len),
    )


def measure(model: nn.Module, suite: PackedSuite) -> SuiteResult:
    """Measure a model on one packed suite; a loss that is not finite is NaN, which the gate fails."""
    from tier1.evaluation.forward import run_rows

    found = run_rows(model, suite.tokens, BATCH_ROWS)
    per_row, n_tokens = suite.tokens.shape[1] - 1, suite.tokens[:, 1:].size
    nats = float(found.nats.sum()) / n_tokens
    return SuiteResult(
        nats_per_token=nats if math.isfinite(nats) else math.nan,
        bits_per_byte=nats * n_tokens / (suite.n_bytes * math.log(2)),
        n_tokens=n_tokens,
        n_bytes=round(suite.n_bytes),
        rows=sha256_hex(np.ascontiguousarray(suite.tokens).tobytes()),
        lines=suite.lines.tolist(),
        row_nats=(found.nats / per_row).tolist(),
        row_hits=(found.hits / per_row).tolist(),
        completions=exact_matches(model, *suite.pairs, BATCH_ROWS),
        routed={str(layer): counts.tolist() for layer, counts in sorted(found.routed.items())},
    )


def evenly_spaced(n_rows: int, n_wanted: int) -> np.ndarray:
    """Return ``min(n_rows, n_wanted)`` different row numbers, evenly spaced from the first on."""
    n_wanted = min(n_rows, n_wanted)
    return np.arange(n_wanted) * n_rows // n_wanted

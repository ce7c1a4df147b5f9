"""Text in, token rows out: JSONL → texts → one token stream → rows of equal length.

A record is ``{"text": …}`` or ``{"prompt": …, "completion": …}``. A bad line is set aside with file, line and reason
and never ends a run; a file without any record does. Texts are joined by the tokenizer's end-of-text token and cut into
rows of seq_len + 1 tokens that overlap by one, so that every token but the first is predicted exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fednested_lib.errors import DataError, SnapshotError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_LINE_BYTES = 16 << 20
END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|im_end|>")
_REMEDY = 'give one {"text": …} or {"prompt": …, "completion": …} per line'


@dataclass(frozen=True, kw_only=True)
class Row:
    """One good record."""

    file: str
    line: int
    text: str


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """One record set aside: where it stands and why; never what it says."""

    file: str
    line: int
    reason: str


def read_jsonl(path: str | Path) -> Iterator[Row | BadRow]:
    """Read a JSONL file record by record.

    Blank lines are skipped. A prompt and its completion become one text, joined by a newline.

    Args:
        path: UTF-8 file, one JSON object per line.

    Returns:
        An iterator in file order.

    Raises:
        DataError: the file is missing, unreadable or has no record at all.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if not any(line.strip() for line in file):
                raise DataError(f"data file {path} is empty: {_REMEDY}")
    except OSError as error:
        raise DataError(
            f"data file {path} cannot be read ({error.strerror}): fix the path or its permissions"
        ) from error
    return _records(path)


def read_texts(path: str | Path) -> tuple[list[str], list[BadRow]]:
    """Read a whole file: its texts and what was set aside.

    Raises:
        DataError: the file is missing, empty or has no good record.
    """
    texts: list[str] = []
    bad: list[BadRow] = []
    for record in read_jsonl(path):
        if isinstance(record, Row):
            texts.append(record.text)
        else:
            bad.append(record)
    if not texts:
        raise DataError(
            f"data file {path} has no usable record, {len(bad)} bad (line {bad[0].line}: {bad[0].reason}): {_REMEDY}"
        )
    return texts, bad


def _records(path: Path) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        yield from read_lines(file, str(path))


def read_lines(lines: Iterable[bytes], file: str, first: int = 1) -> Iterator[Row | BadRow]:
    """Read the records of consecutive lines of `file`, numbered from `first`."""
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            text = _text_of(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            yield Row(file=file, line=number, text=text)
        except Unusable as error:
            yield BadRow(file=file, line=number, reason=str(error))


def require_text(path: str | Path) -> None:
    """Check that a file has a usable record, reading no further than the first.

    Raises:
        DataError: the file is missing, empty or has no good record.
    """
    if not any(isinstance(record, Row) for record in read_jsonl(path)):
        read_texts(path)


class Unusable(Exception):
    """Why a line is set aside."""


def _text_of(line: bytes) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise Unusable(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise Unusable("not UTF-8") from None
    except (ValueError, RecursionError):
        raise Unusable("not JSON") from None
    if not isinstance(document, dict):
        raise Unusable("not a JSON object")
    return text_of(document)


def text_of(document: Mapping) -> str:
    """Return the text of a record.

    Raises:
        Unusable: it has none that can be trained on.
    """
    parts = [document.get(key) for key in (("text",) if "text" in document else ("prompt", "completion"))]
    if None in parts:
        raise Unusable('neither "text" nor "prompt" and "completion"')
    if not all(isinstance(part, str) for part in parts):
        raise Unusable("text is not a string")
    text = "\n".join(parts)
    if not text.strip():
        raise Unusable("text is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON may escape half a surrogate pair, which no tokenizer can encode
        raise Unusable("text has a lone surrogate") from None
    return text


def load_tokenizer(data: bytes) -> Tokenizer:
    """Parse the bytes of a tokenizer.json.

    Raises:
        SnapshotError: reason ``bad_tokenizer``.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the Rust parser raises a bare Exception
        raise SnapshotError(
            "bad_tokenizer", f"tokenizer of {len(data)} bytes cannot be parsed ({error}): publish the snapshot again"
        ) from error
    # What its file asks for serves batches of sentences: it would cut texts off, and fill them up with other tokens.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id of the end-of-text token.

    Raises:
        DataError: the tokenizer has none of the known ones.
    """
    for token in END_OF_TEXT:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return token_id
    raise DataError(
        f"tokenizer has no end-of-text token, needs one of {', '.join(END_OF_TEXT)}: "
        "train it with one as a special token"
    )


def pack(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    source: str | Path = "text",
    key: str = "training.seq_len",
) -> np.ndarray:
    """Join texts by end-of-text and cut the stream into rows.

    The rest of less than seq_len tokens at the end is dropped.

    Args:
        texts: in order.
        tokenizer: of the snapshot.
        seq_len: predicted tokens per row, ≥ 1.
        source: the file, named in the error.
        key: where the configuration sets seq_len, named in the error.

    Returns:
        int32 [n, seq_len + 1]; row i starts with the last token of row i − 1.

    Raises:
        DataError: less text than one row.
    """
    assert seq_len >= 1
    end = end_of_text_id(tokenizer)
    stream = np.concatenate([np.empty(0, np.int32), *_encoded(texts, tokenizer, end)])
    n = (len(stream) - 1) // seq_len
    if n < 1:
        raise DataError(
            f"{source} has {len(stream)} tokens, needs at least {seq_len + 1} ({key} + 1): add text or lower {key}"
        )
    return np.stack([stream[i * seq_len : (i + 1) * seq_len + 1] for i in range(n)])


def _encoded(texts: Iterable[str], tokenizer: Tokenizer, end: int) -> Iterator[np.ndarray]:
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        yield np.asarray([*ids, end], dtype=np.int32)

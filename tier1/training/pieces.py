"""Pieces of text become tokens, each on its own: records are read, validated and encoded, by several processes.

What a piece becomes depends on nothing but its bytes and the tokenizer, and results come in the order of the pieces, so
the number of processes changes nothing but the time. Those processes are spawned, not forked: the one that packs may
hold torch's threads. Each ends with the one that started it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from fednested_lib.errors import TransportError
from fednested_lib.text import BadRow, Row, end_of_text_id, load_tokenizer
from tier1.training.duplicates import digests_of
from tier1.training.fast_tokens import FastEncoder
from tier1.training.sources import Lines, Rows

_AHEAD = 2  # pieces per process that wait to be encoded or written


@dataclass(frozen=True, kw_only=True)
class EncodedPiece:
    """A piece's good texts as tokens, and its bad records.

    Args:
        tokens: int32, the ids of each text with the end-of-text id after it, concatenated.
        counts: int64 [n], tokens of each text; empty where duplicates are not looked for.
        sizes: int64 [n], UTF-8 bytes of each text.
        lines: int64 [n], where each text stands.
        digests: S16 [n], of each text; empty where duplicates are not looked for.
        bad: Records set aside, in order.
    """

    tokens: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray
    lines: np.ndarray
    digests: np.ndarray
    bad: list[BadRow]


class PieceEncoder:
    """Encodes pieces.

    Args:
        tokenizer: Bytes of ``tokenizer.json``.
        dedupe: Whether texts are given digests.

    Raises:
        SnapshotError: They are no tokenizer, or it has no end-of-text token.
    """

    def __init__(self, tokenizer: bytes, *, dedupe: bool) -> None:
        self.encoder, self.dedupe = FastEncoder(tokenizer), dedupe

    def __call__(self, piece: Lines | Rows) -> EncodedPiece:
        """Read, validate and encode one piece.

        Raises:
            DataError: Its file cannot be read any more.
        """
        records = list(piece.records())
        good, refused = validate([record for record in records if isinstance(record, Row)])
        bad = [record for record in records if isinstance(record, BadRow)]
        texts = [record.text for record in good]
        tokens = self.encoder.encode(texts)
        return EncodedPiece(
            tokens=tokens,
            counts=self._counts(texts, tokens) if self.dedupe else np.empty(0, dtype=np.int64),
            sizes=np.array([_n_bytes(text) for text in texts], dtype=np.int64),
            lines=np.array([record.line for record in good], dtype=np.int64),
            digests=digests_of(texts if self.dedupe else ()),
            bad=sorted([*bad, *refused], key=lambda record: record.line),
        )

    def _counts(self, texts: Sequence[str], tokens: np.ndarray) -> np.ndarray:
        ends = np.flatnonzero(tokens == self.encoder.end)
        if len(ends) == len(texts):
            return np.diff(ends, prepend=-1)
        # A text spells out the end-of-text token.
        return np.array([len(self.encoder.encode([text])) for text in texts], dtype=np.int64)


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

    columns = ("file", "line", "text")
    frame = pandas.DataFrame({name: [getattr(record, name) for record in records] for name in columns})
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


def encode_pieces(
    pieces: Iterable[tuple[str, Lines | Rows]], tokenizer: bytes, *, dedupe: bool, workers: int
) -> Iterator[tuple[str, EncodedPiece]]:
    """Yield what the pieces become, in their order.

    Args:
        pieces: (dataset name, piece), read as they are needed, a few ahead.
        tokenizer: Bytes of ``tokenizer.json``.
        dedupe: Whether texts are given digests.
        workers: Processes; 1 is this one.

    Raises:
        DataError: A file cannot be read.
        TransportError: A process was killed.
    """
    if workers == 1:
        encode = PieceEncoder(tokenizer, dedupe=dedupe)
        yield from ((name, encode(piece)) for name, piece in pieces)
        return
    end_of_text_id(load_tokenizer(tokenizer))  # what fails as a process begins looks like its death
    spawn, waiting = multiprocessing.get_context("spawn"), deque[tuple[str, Future[EncodedPiece]]]()
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin, initargs=(tokenizer, dedupe)) as pool:
        try:
            for name, piece in pieces:
                waiting.append((name, pool.submit(_encode, piece)))
                if len(waiting) > _AHEAD * workers:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        except BrokenProcessPool:
            raise TransportError(
                f"one of {workers} processes that pack text was killed, by its memory limit perhaps; nothing was kept: "
                "run again with more memory, or on fewer cores (taskset; in a pod, a smaller CPU limit)"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _first(waiting: deque[tuple[str, Future[EncodedPiece]]]) -> tuple[str, EncodedPiece]:
    name, future = waiting.popleft()
    return name, future.result()


def _begin(tokenizer: bytes, dedupe: bool) -> None:
    global _encoder
    _encoder = PieceEncoder(tokenizer, dedupe=dedupe)
    # Nothing else ends a process that waits for work when its parent is killed: it holds both ends of the queue.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _encode(piece: Lines | Rows) -> EncodedPiece:
    return _encoder(piece)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))

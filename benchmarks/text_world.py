"""JSONL of real text with broken records among it, and the process that packs it.

    python -m benchmarks.text_world JSONL TOKENIZER OUT        # prints the seconds that packing took, on 2 cores

The text is sources and documents of the installed packages and this README, cut at random into records of 1 to some
10⁵ characters. One record in a hundred, at random, is broken in one of eight ways.
"""

from __future__ import annotations

import json
import os
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 20261123
CORES = 2
SEQ_LEN = 512
BROKEN_SHARE = 0.01
_KINDS = {".py", ".md", ".rst", ".txt"}
# What a text may not hold: the schema refuses binary, and some sources have form feeds.
_CONTROL = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127])
# A record is broken like this: what is written in the place of a text, and the reason that must be given.
_BROKEN = (
    (lambda text: json.dumps({"text": text}).encode()[:-2], "not JSON"),
    (lambda text: b'{"text": "\xff' + text.encode() + b'"}', "not UTF-8"),
    (lambda text: json.dumps([text]).encode(), "not a JSON object"),
    (lambda text: json.dumps({"words": text}).encode(), 'neither "text" nor "prompt" and "completion"'),
    (lambda text: json.dumps({"text": len(text)}).encode(), "text is not a string"),
    (lambda text: json.dumps({"text": " \n" * 5}).encode(), "text is empty"),
    (lambda text: json.dumps({"text": text + "\ud800"}).encode(), "text has a lone surrogate"),
    (lambda text: json.dumps({"text": text + "\x07"}).encode(), "text has control characters"),
)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a file holds: its size, UTF-8 bytes of the good texts, and (line, reason) of each broken record."""

    size_bytes: int
    text_bytes: int
    broken: list[tuple[int, str]]


def write_text(path: Path, size_bytes: int, seed: int = SEED) -> Written:
    """Write at least `size_bytes` of JSONL."""
    rng, size, text_bytes, broken = random.Random(seed), 0, 0, list[tuple[int, str]]()
    with path.open("wb") as file:
        for number, text in enumerate(texts(rng), start=1):
            if rng.random() < BROKEN_SHARE:
                written, reason = rng.choice(_BROKEN)
                line = written(text).replace(b"\n", b" ")
                broken.append((number, reason))
            else:
                line = json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5).encode()
                text_bytes += len(text.encode())
            size += file.write(line + b"\n")
            if size >= size_bytes:
                return Written(size_bytes=size, text_bytes=text_bytes, broken=broken)


def texts(rng: random.Random) -> Iterator[str]:
    """Yield real text for ever, from files in random order; when all have been read, again in other cuts."""
    root = Path(sysconfig.get_paths()["purelib"])
    files = [Path("README.md"), *sorted(path for path in root.rglob("*") if path.suffix in _KINDS and path.is_file())]
    while True:
        rng.shuffle(files)
        for path in files:
            text, begin = path.read_text(encoding="utf-8", errors="ignore").translate(_CONTROL), 0
            while begin < len(text):
                end = begin + 1 + int(rng.lognormvariate(7, 1.2))
                if text[begin:end].strip():
                    yield text[begin:end]
                begin = end


def main(source: str, tokenizer: str, out: str) -> None:
    """Pack a file on two cores and print the seconds."""
    from tier1.training.data import prepare_dataset

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    data, began = Path(tokenizer).read_bytes(), time.monotonic()
    prepare_dataset({"text": Path(source)}, data, seq_len=SEQ_LEN, out_dir=Path(out))
    print(time.monotonic() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])

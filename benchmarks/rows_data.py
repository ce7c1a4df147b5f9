"""Text into packed rows, streamed: item 6 of issue 6.

1 GB of JSONL made of real text, one record in a hundred broken (`benchmarks/text_world.py`), is packed five times by a
process on two cores, with everything that belongs to it: the digest of the file, the start of its processes, the disk.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.measure import watch
from benchmarks.registry import Reading, figure
from benchmarks.text_world import SEED, SEQ_LEN, Written, texts, write_text
from fednested_lib.text import load_tokenizer, pack
from tier1.training.data import PackedDataset, prepare_dataset
from tier1.training.tokenizer import train_tokenizer

SIZE_BYTES = 1_000_000_000
SAMPLE_BYTES = 12 << 20
REPEATS = 5
VOCABULARY = 8192


@figure("data.rate", unit="MB/s", bound=">= 20", cls="long")
def rate() -> Reading:
    """JSONL that is read, validated, tokenised and packed per second on 2 cores, 1 GB of real text; median of 5."""
    run = _packed()
    return Reading.of([run.written.size_bytes / 1e6 / seconds for seconds in run.seconds])


@figure("data.memory", unit="MiB", bound="<= 1024", cls="long")
def memory() -> float:
    """Peak memory of all processes together (PSS) while 1 GB of JSONL is packed, largest of 5 runs."""
    return max(_packed().peak_mib)


@figure("data.set_aside", unit="%", bound="== 100", cls="long")
def set_aside() -> float:
    """Share of the broken records (1 % of 1 GB, eight kinds) set aside by line and reason, no good one lost."""
    return _found(_packed().written, _packed().set_aside, _packed().counts)


@figure("data.workers_equal", unit="1", bound="== 0", cls="full")
def workers_equal() -> float:
    """Tokens of a 12 MiB sample that differ between packing on 1 process, on 2, and by the device's rule."""
    with tempfile.TemporaryDirectory() as directory:
        return float(_differing(Path(directory)))


@dataclass(frozen=True, kw_only=True)
class _Run:
    written: Written
    seconds: list[float]
    peak_mib: list[float]
    counts: dict
    set_aside: list[tuple[int, str]]


@cache
def _packed() -> _Run:
    with tempfile.TemporaryDirectory() as directory:
        source, tokenizer, out = (Path(directory) / name for name in ("text.jsonl", "tokenizer.json", "out"))
        if _differing(Path(directory)):
            raise RuntimeError("rows depend on the number of processes, or differ from the device's")
        written, seconds, peaks = write_text(source, SIZE_BYTES), list[float](), list[float]()
        tokenizer.write_bytes(_tokenizer())
        for _ in range(REPEATS):
            shutil.rmtree(out, ignore_errors=True)
            took, peak = _pack_once(source, tokenizer, out)
            seconds.append(took)
            peaks.append(peak)
        (summary,) = (path for path in out.glob("*.json"))
        return _Run(
            written=written,
            seconds=seconds,
            peak_mib=peaks,
            counts=json.loads(summary.read_bytes())["counts"],
            set_aside=_set_aside(out),
        )


def _pack_once(source: Path, tokenizer: Path, out: Path) -> tuple[float, float]:
    """Return seconds and peak MiB."""
    command = [sys.executable, "-m", "benchmarks.text_world", source, tokenizer, out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        cost = watch(process, timeout_s=1800)
        if cost.code:
            raise RuntimeError(f"packing ended with {cost.code}")
        return float(process.stdout.read()), cost.peak_gib * 1024


def _found(written: Written, aside: list[tuple[int, str]], counts: dict) -> float:
    broken = set(written.broken)
    if not set(aside) <= broken or counts["n_bytes"] != written.text_bytes:
        raise RuntimeError(
            f"good records were lost: {len(set(aside) - broken)} set aside without a cause, {counts['n_bytes']} of "
            f"{written.text_bytes} bytes packed"
        )
    return 100 * len(set(aside)) / len(broken)


def _differing(directory: Path) -> int:
    """Return how many tokens differ, after the sample's broken records were found on 1 process and on 2."""
    source = directory / "sample.jsonl"
    written = write_text(source, SAMPLE_BYTES)
    packed = [_sample(source, directory / f"sample-{n}", n) for n in (1, 2)]
    for dataset in packed:
        if _found(written, _set_aside(dataset.path.parent), {"n_bytes": dataset.n_bytes}) < 100:
            raise RuntimeError("not all broken records were set aside")
    broken = {line for line, _ in written.broken}
    lines = enumerate(source.read_bytes().removesuffix(b"\n").split(b"\n"), start=1)
    good = (json.loads(line)["text"] for number, line in lines if number not in broken)
    expected = pack(good, load_tokenizer(_tokenizer()), SEQ_LEN)
    return sum(int(np.count_nonzero(dataset.tokens() != expected)) for dataset in packed)


def _sample(source: Path, out: Path, workers: int) -> PackedDataset:
    return prepare_dataset({"text": source}, _tokenizer(), seq_len=SEQ_LEN, out_dir=out, workers=workers)


def _set_aside(out: Path) -> list[tuple[int, str]]:
    lines = (out / "set_aside.jsonl").read_text(encoding="utf-8").splitlines()
    return [(record["line"], record["reason"]) for record in map(json.loads, lines)]


@cache
def _tokenizer() -> bytes:
    return train_tokenizer(list(islice(texts(random.Random(SEED)), 3000)), VOCABULARY)

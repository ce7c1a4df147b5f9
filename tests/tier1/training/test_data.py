from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fednested_lib.errors import DataError, TransportError
from fednested_lib.text import Row, load_tokenizer, pack, read_jsonl
from tier1.training.data import SET_ASIDE_FILE, prepare_dataset
from tier1.training.duplicates import Seen, digests_of
from tier1.training.pieces import encode_pieces, validate
from tier1.training.rows import RowWriter
from tier1.training.sources import PIECE_BYTES, Source, _batches, see


def rows_of(texts):
    return [{"text": text} for text in texts]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr("tier1.training.sources.PIECE_BYTES", 500)


@pytest.mark.parametrize("workers", [1, 2])
def test_packing_equals_the_device_rule(tmp_path, write_jsonl, tokenizer, texts, small_pieces, workers):
    """Guards that tier 1 and devices cut text alike, whatever the pieces and on several processes."""
    texts = [*texts, "x" * 2000, *texts, "ends with <|endoftext|> spelt out", *texts]
    source = write_jsonl("a.jsonl", rows_of(texts))
    assert len(list(see(source).pieces())) > 10
    out = tmp_path / "o"
    dataset = prepare_dataset({"a": source}, tokenizer, seq_len=16, out_dir=out, workers=workers)
    expected = pack(texts, load_tokenizer(tokenizer), 16)
    np.testing.assert_array_equal(dataset.tokens(), expected)
    assert dataset.n_rows == len(expected)
    assert dataset.n_tokens == 16 * len(expected)
    assert dataset.n_bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\n\n \n", b""])
@pytest.mark.parametrize("size", [1, 7, 40, 10_000])
def test_pieces_are_the_file(tmp_path, monkeypatch, ending, size):
    """Guards that every record of a file is read once, under its own number, wherever the file is cut."""
    monkeypatch.setattr("tier1.training.sources.PIECE_BYTES", size)
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "%d"}' % i if i % 3 else b"broken" + b"x" * i for i in range(1, 40)]
    path.write_bytes(b"\xef\xbb\xbf" + (ending or b"\n").join(lines) + ending)
    seen = see(path)
    assert seen.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [record for piece in seen.pieces() for record in piece.records()] == list(read_jsonl(path))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_becomes_shorter_meanwhile_is_one_error(tmp_path, write_jsonl, tokenizer, texts, workers):
    """Guards against waiting for ever for bytes that are gone."""
    path = write_jsonl("a.jsonl", rows_of(texts))
    pieces = list(see(path).pieces())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="became shorter"):
        list(encode_pieces([("a", piece) for piece in pieces], tokenizer, dedupe=False, workers=workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_without_end_of_text_is_named(tmp_path, write_jsonl, tokenizer, texts, workers):
    """Guards that what processes cannot begin with is not taken for their death."""
    document = json.loads(tokenizer)
    document["added_tokens"] = []
    document["model"]["vocab"]["<other>"] = document["model"]["vocab"].pop("<|endoftext|>")
    path = write_jsonl("a.jsonl", rows_of(texts))
    with pytest.raises(DataError, match="no end-of-text token"):
        prepare_dataset({"a": path}, json.dumps(document).encode(), seq_len=16, out_dir=tmp_path / "o", workers=workers)


def test_a_line_without_end_is_set_aside_unread(tmp_path, monkeypatch):
    """Guards that a line of any length costs bounded memory and is located; its neighbours are read."""
    monkeypatch.setattr("tier1.training.sources.MAX_LINE_BYTES", 100)
    monkeypatch.setattr("fednested_lib.text.MAX_LINE_BYTES", 100)
    monkeypatch.setattr("tier1.training.sources.PIECE_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b"x" * 1000 + b'\n{"text": "b"}\n')
    records = [record for piece in see(path).pieces() for record in piece.records()]
    assert [(record.line, getattr(record, "reason", None)) for record in records] == [
        (1, None),
        (2, "longer than 100 bytes"),
        (3, None),
    ]


@pytest.mark.parametrize("sizes", [[1000], [1] * 50, [15, 1, 16, 17, 33, 0, 500], [17], [16, 1]])
def test_rows_do_not_depend_on_how_tokens_come(tmp_path, monkeypatch, sizes):
    """Guards the seams of rows: overlapping by one token, the rest dropped, at every remainder."""
    monkeypatch.setattr("tier1.training.rows.CHUNK_ROWS", 3)
    stream, begin = np.arange(sum(sizes), dtype=np.int32), 0
    with RowWriter(tmp_path / "a.npy", 16) as rows:
        for size in sizes:
            rows.append(stream[begin : begin + size])
            begin += size
        n = rows.finish(source="a")
    expected = [stream[i * 16 : i * 16 + 17] for i in range((len(stream) - 1) // 16)]
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)
    assert n == len(expected)


def test_a_killed_process_is_one_error_and_nothing_is_kept(tmp_path, write_jsonl, tokenizer, texts, monkeypatch):
    """Guards that rows are whole or absent: of a run whose process was killed no file remains."""
    monkeypatch.setattr("tier1.training.pieces._encode", _die)
    source, out = write_jsonl("a.jsonl", rows_of(texts)), tmp_path / "out"
    with pytest.raises(TransportError, match="one of 2 processes that pack text was killed"):
        prepare_dataset({"a": source}, tokenizer, seq_len=16, out_dir=out, workers=2)
    assert not list(out.iterdir())


def _die(piece):
    os.kill(os.getpid(), signal.SIGKILL)


# Ends as a killed process does, with the spawned ones waiting for work.
ORPHANS = """
import multiprocessing, os, signal, sys
from pathlib import Path
from tier1.training.data import prepare_dataset
import tier1.training.rows as rows

def killed(self, tokens):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    rows.RowWriter.append = killed
    text, tokenizer, out = map(Path, sys.argv[1:])
    prepare_dataset({"a": text}, tokenizer.read_bytes(), seq_len=16, out_dir=out, workers=2)
"""


def test_processes_end_with_the_one_that_packs(tmp_path, write_jsonl, tokenizer, texts):
    """Guards that a killed packer leaves no process behind, and of files only such as are swept."""
    source, out = write_jsonl("a.jsonl", rows_of(texts)), tmp_path / "out"
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    (tmp_path / "orphans.py").write_text(ORPHANS, encoding="utf-8")
    command = [sys.executable, tmp_path / "orphans.py", source, tmp_path / "tokenizer.json", out]
    # The pipe has its end only when the last process that inherited it is gone.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.split()) == 2
    assert {path.suffix for path in out.iterdir()} == {".tmp"}


def test_duplicates_are_set_aside_across_datasets(tmp_path, write_jsonl, tokenizer, texts, small_pieces):
    """Guards that the first of equal texts stays, the others are counted and located, and only if asked."""
    a = write_jsonl("a.jsonl", [*rows_of(texts), {"text": 5}, {"text": texts[0]}, {"text": texts[0] + " "}])
    b = write_jsonl("b.jsonl", rows_of([texts[3], "new <|endoftext|> words", texts[3]]))
    sources, kept = {"b": b, "a": a}, [*texts, texts[0] + " ", "new <|endoftext|> words"]
    dataset = prepare_dataset(sources, tokenizer, seq_len=16, out_dir=tmp_path / "1", dedupe=True)
    np.testing.assert_array_equal(dataset.tokens(), pack(kept, load_tokenizer(tokenizer), 16))
    assert dataset.duplicates == {"a": 1, "b": 2}
    assert (dataset.n_set_aside, dataset.n_bytes) == (4, sum(map(len, kept)))
    written, n = (tmp_path / "1" / "set_aside.jsonl").read_text(encoding="utf-8"), len(texts)
    assert [(r["file"], r["line"], r["reason"]) for r in map(json.loads, written.splitlines())] == [
        (str(a), n + 1, "text is not a string"),
        (str(a), n + 2, "text is a duplicate"),
        (str(b), 1, "text is a duplicate"),
        (str(b), 3, "text is a duplicate"),
    ]
    whole = prepare_dataset(sources, tokenizer, seq_len=16, out_dir=tmp_path / "1")
    assert whole.digest != dataset.digest
    assert (whole.n_set_aside, whole.duplicates) == (1, {})


def test_seen_texts_are_those_of_a_set():
    """Guards the sorted runs of digests against Python's own set, over batches of every size."""
    rng, seen, known = np.random.default_rng(0), Seen(), set()
    for size in [1, 5, 0, 200, 3, 1, 1, 40, 300, 2] * 3:
        texts = [str(n) for n in rng.integers(0, 1500, size)]
        expected = [text not in known and text not in texts[:i] for i, text in enumerate(texts)]
        assert seen.add(digests_of(texts)).tolist() == expected
        known.update(texts)


def test_a_bad_row_is_found_by_dataset_and_by_the_file_that_has_it_now(tmp_path, tokenizer, texts):
    """Guards two files of one name, and a file that is moved after packing: rows are cached, paths are not."""
    sources = {name: tmp_path / name / "train.jsonl" for name in ("north", "south")}
    for number, path in enumerate(sources.values(), start=1):
        path.parent.mkdir()
        path.write_text("\n".join([*map(json.dumps, rows_of(texts)), *["{"] * number]) + "\n")

    def shown():
        packed = prepare_dataset(sources, tokenizer, seq_len=16, out_dir=tmp_path / "out")
        written = (packed.path.parent / "set_aside.jsonl").read_text(encoding="utf-8")
        return [(r["dataset"], r["file"], r["line"]) for r in map(json.loads, written.splitlines())]

    n = len(texts)
    assert shown() == [(k, str(sources[k]), n + i) for k, i in (("north", 1), ("south", 1), ("south", 2))]
    sources["north"] = sources["north"].rename(tmp_path / "moved.jsonl")
    assert shown()[0] == ("north", str(tmp_path / "moved.jsonl"), n + 1)


def write_parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_parquet_gives_the_rows_of_the_same_jsonl(tmp_path, write_jsonl, tokenizer, texts, small_pieces, workers):
    """Guards that the format changes neither rows nor what is set aside, across row groups and batches."""
    texts = [*texts, None, "\x07", "  ", *texts]
    path = write_parquet(tmp_path / "a.parquet", {"id": range(len(texts)), "text": texts}, row_group_size=50)
    jsonl = write_jsonl("a.jsonl", rows_of(texts))
    one = prepare_dataset({"a": path}, tokenizer, seq_len=16, out_dir=tmp_path / "p", workers=workers)
    other = prepare_dataset({"a": jsonl}, tokenizer, seq_len=16, out_dir=tmp_path / "j")
    np.testing.assert_array_equal(one.tokens(), other.tokens())
    aside = [(tmp_path / name / "set_aside.jsonl").read_text(encoding="utf-8") for name in ("p", "j")]
    assert aside[0] == aside[1].replace(str(jsonl), str(path))
    assert one.n_set_aside == 3


def test_a_text_that_parquet_holds_once_is_cut_like_many(tmp_path):
    """Guards memory: a small file of one long text many times is read in pieces of what it is, not of what it takes."""
    text = "a long text " * 2000
    path = write_parquet(tmp_path / "a.parquet", {"text": [text] * 3000}, use_dictionary=True)
    assert path.stat().st_size < 1 << 20
    pieces = list(_batches(path))
    assert max(piece.batch.nbytes for piece in pieces) <= PIECE_BYTES
    assert [piece.first for piece in pieces] == list(
        itertools.accumulate((piece.batch.num_rows for piece in pieces[:-1]), initial=1)
    )
    assert sum(piece.batch.num_rows for piece in pieces) == 3000


def test_parquet_of_prompts_and_of_bytes_that_are_no_text(tmp_path, tokenizer):
    """Guards that pairs are joined as in JSONL and that a string that is not UTF-8 is set aside alone."""
    pairs = write_parquet(tmp_path / "a.parquet", {"prompt": ["p"] * 20, "completion": pyarrow.array(["c"] * 20)})
    torn = pyarrow.array([b"words " * 20, b"\xff\xfe", b"more"]).view(pyarrow.string())
    torn = write_parquet(tmp_path / "b.parquet", {"text": torn})
    dataset = prepare_dataset({"a": pairs, "b": torn}, tokenizer, seq_len=16, out_dir=tmp_path / "out")
    kept = ["p\nc"] * 20 + ["words " * 20, "more"]
    np.testing.assert_array_equal(dataset.tokens(), pack(kept, load_tokenizer(tokenizer), 16))
    written = json.loads((tmp_path / "out" / "set_aside.jsonl").read_text(encoding="utf-8"))
    assert written == {"dataset": "b", "file": str(torn), "line": 2, "reason": "not UTF-8"}


def test_unusable_parquet_is_one_error(tmp_path, tokenizer, texts):
    """Guards that a torn, altered, textless or empty Parquet file is named with its remedy and leaves nothing."""
    whole = write_parquet(tmp_path / "whole.parquet", {"text": texts * 50}, compression="none").read_bytes()
    files = {
        "torn": (whole[:-100], "cannot be read as Parquet after row 0"),
        "altered": (whole[:10] + b"\xff" * 400 + whole[410:], "cannot be read as Parquet after row 0"),
        "empty": (b"", "cannot be read as Parquet"),
    }
    for name, (data, message) in files.items():
        (tmp_path / f"{name}.parquet").write_bytes(data)
        with pytest.raises(DataError, match=message):
            prepare_dataset({"a": tmp_path / f"{name}.parquet"}, tokenizer, seq_len=16, out_dir=tmp_path / "out")
    needs = "must have one column text, or prompt and completion, of strings, "
    for columns, message in (
        ({"words": ["a"]}, needs + r"got words \(string\)"),
        ({"text": [1]}, needs + r"got text \(int64\)"),
        (pyarrow.table([["a"], ["b"]], ["text", "text"]), needs + r"got text \(string\), text \(string\)"),
        ({"text": pyarrow.array([], pyarrow.string())}, "is empty"),
    ):
        path = write_parquet(tmp_path / "b.parquet", columns)
        with pytest.raises(DataError, match=message):
            prepare_dataset({"b": path}, tokenizer, seq_len=16, out_dir=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_sources_are_packed_in_the_order_of_their_names(tmp_path, write_jsonl, tokenizer, texts):
    """Guards that the order of a mapping does not change the data."""
    a, b = write_jsonl("a.jsonl", rows_of(texts[:30])), write_jsonl("b.jsonl", rows_of(texts[30:]))
    one = prepare_dataset({"a": a, "b": b}, tokenizer, seq_len=16, out_dir=tmp_path / "1")
    two = prepare_dataset({"b": b, "a": a}, tokenizer, seq_len=16, out_dir=tmp_path / "2")
    assert one.digest == two.digest
    np.testing.assert_array_equal(one.tokens(), two.tokens())


def test_bad_records_are_set_aside_by_place_and_reason_only(tmp_path, tokenizer):
    """Guards that no bad record ends a run, and that no value of one is written anywhere."""
    path = tmp_path / "mixed.jsonl"
    good = json.dumps({"text": "good words " * 10}).encode()
    path.write_bytes(
        b"\n".join(
            [
                good,
                b'{"text": "secret \\u0000 binary"}',
                b"secret, not JSON",
                b'{"text": "\xff\xfe secret"}',
                b'{"text": 5}',
                b'{"text": "  "}',
                b'{"text": "' + b"secret " * 200_000 + b'"}',
                b'{"prompt": "p", "completion": "c"}',
                good,
            ]
        )
    )
    dataset = prepare_dataset({"m": path}, tokenizer, seq_len=8, out_dir=tmp_path / "out")
    assert dataset.n_set_aside == 6
    written = (tmp_path / "out" / "set_aside.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in written.splitlines()]
    assert [(record["file"], record["line"]) for record in records] == [(str(path), line) for line in range(2, 8)]
    assert all(set(record) == {"dataset", "file", "line", "reason"} for record in records)
    assert records[0]["reason"] == "text has control characters"
    for file in (tmp_path / "out").iterdir():
        assert b"secret" not in file.read_bytes()


def test_validation_keeps_order_and_names_the_failed_check():
    """Guards that a refused record takes neither its neighbours nor its text with it."""
    records = [Row(file="f", line=i, text=text) for i, text in enumerate(["a", "\x07", "b", "x" * 1_000_001], start=1)]
    good, refused = validate(records)
    assert [record.text for record in good] == ["a", "b"]
    assert [(record.line, record.reason) for record in refused] == [
        (2, "text has control characters"),
        (4, "text is longer than 1000000 characters"),
    ]


def test_a_file_that_changes_while_it_is_packed_is_refused(tmp_path, write_jsonl, tokenizer, texts, monkeypatch):
    """Guards the digest: rows of other bytes than it names are never cached, though the file is as long as before."""
    path, out = write_jsonl("a.jsonl", rows_of(texts)), tmp_path / "out"
    pieces = Source.pieces

    def meanwhile(source):
        other = path.with_suffix(".other")
        other.write_bytes(path.read_bytes().replace(b"fox", b"dog"))
        other.replace(path)
        return pieces(source)

    monkeypatch.setattr(Source, "pieces", meanwhile)
    with pytest.raises(DataError, match=r"a.jsonl was changed while it was packed: run again when it is complete"):
        prepare_dataset({"a": path}, tokenizer, seq_len=16, out_dir=out)
    assert list(out.iterdir()) == []


def test_the_cache_is_keyed_by_content(tmp_path, write_jsonl, tokenizer, texts, monkeypatch):
    """Guards that equal inputs are not packed twice, and that any changed input is packed anew."""
    path, out = write_jsonl("a.jsonl", [*rows_of(texts), {"text": ""}]), tmp_path / "out"
    first = prepare_dataset({"a": path}, tokenizer, seq_len=16, out_dir=out)
    monkeypatch.setattr("tier1.training.data.encode_pieces", lambda *a, **k: pytest.fail("packed again"))
    (out / "set_aside.jsonl").unlink()
    assert prepare_dataset({"a": path}, tokenizer, seq_len=16, out_dir=out) == first
    assert len((out / "set_aside.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    monkeypatch.undo()
    assert prepare_dataset({"a": path}, tokenizer, seq_len=8, out_dir=out).digest != first.digest
    path.write_text(path.read_text(encoding="utf-8") + '{"text": "one more"}\n', encoding="utf-8")
    assert prepare_dataset({"a": path}, tokenizer, seq_len=16, out_dir=out).digest != first.digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"\xff\xfe\n\xff\n", r"has 0 usable records, needs at least 1; 2 set aside \(line 1: not UTF-8\)"),
        (b'{"text": "\\u0001 secret"}\n', r"line 1: text has control characters"),
        (b'{"text": "hi"}\n', r"a\.jsonl has \d+ tokens, needs at least 17 \(core\.seq_len \+ 1\)"),
    ],
)
def test_unusable_files_are_refused(tmp_path, tokenizer, content, message):
    """Guards that missing, empty, non-UTF-8, all-bad and too short files each give one line with value and remedy."""
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        prepare_dataset({"a": path}, tokenizer, seq_len=16, out_dir=tmp_path / "out")
    assert "secret" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.npy"))
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_no_dataset_is_refused(tmp_path, tokenizer):
    """Guards that an empty core.datasets is named."""
    with pytest.raises(DataError, match=r"got 0: name a JSONL file under core\.datasets"):
        prepare_dataset({}, tokenizer, seq_len=16, out_dir=tmp_path)


# Packs in a process of its own, because a SIGBUS ends one.
FULL_DISK = """
import sys
from pathlib import Path
from fednested_lib.errors import StorageError
from tier1.training.data import prepare_dataset

text, tokenizer, out = map(Path, sys.argv[1:])
try:
    prepare_dataset({"a": text}, tokenizer.read_bytes(), seq_len=16, out_dir=out / "packed")
except StorageError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_our_error_and_leaves_nothing(tmp_path, write_jsonl, tokenizer, texts):
    """Rows that do not fit end in a line with the remedy, not in the SIGBUS of a sparse mapping."""
    source, small = write_jsonl("a.jsonl", rows_of(texts * 20)), tmp_path / "small"
    whole = prepare_dataset({"a": source}, tokenizer, seq_len=16, out_dir=tmp_path / "whole")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    size = int(whole.path.stat().st_size * 0.75)
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", small]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this sandbox does not allow mounts")
    try:
        command = [sys.executable, "-c", FULL_DISK, source, tmp_path / "tokenizer.json", small]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.returncode, done.stderr)
        assert "cannot write packed tokens" in done.stdout
        assert "No space left on device" in done.stdout
        assert not [path for path in small.rglob("*") if path.is_file()]
    finally:
        subprocess.run(["umount", small], check=True)


def test_leftovers_of_killed_packers_are_swept(tmp_path, write_jsonl, tokenizer, texts):
    """An old partial file is removed by the next packing; a young one belongs to a packer at work and stays."""
    out = tmp_path / "out"
    out.mkdir()
    old, young = out / "aa.1.rows.tmp", out / "bb.2.tmp"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    prepare_dataset({"a": write_jsonl("a.jsonl", rows_of(texts))}, tokenizer, seq_len=16, out_dir=out)
    assert not old.exists()
    assert young.exists()


def test_a_packer_on_another_machine_may_have_the_same_pid(tmp_path, write_jsonl, tokenizer, texts):
    """Guards a shared home: the partial files of a packer elsewhere that has this one's number are left alone."""
    source = {"a": write_jsonl("a.jsonl", rows_of(texts))}
    rows = prepare_dataset(source, tokenizer, seq_len=16, out_dir=tmp_path / "alone").path
    names = [f"{rows.stem}.{os.getpid()}.{kind}.tmp" for kind in ("rows", "aside")]
    theirs = [tmp_path / "shared" / name for name in (*names, f"{SET_ASIDE_FILE}.{os.getpid()}.tmp")]
    theirs[0].parent.mkdir()
    for path in theirs:
        path.write_bytes(b"half a row")
    prepare_dataset(source, tokenizer, seq_len=16, out_dir=tmp_path / "shared")
    assert [path.read_bytes() for path in theirs if path.exists()] == [b"half a row"] * 3
    assert len(list(theirs[0].parent.glob("*.tmp"))) == 3, "and none of its own remains"

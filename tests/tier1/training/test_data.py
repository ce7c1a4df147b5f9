from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fednested_lib.errors import DataError
from fednested_lib.text import Row, load_tokenizer, pack
from tier1.training.data import BATCH_RECORDS, prepare_dataset, validate


def rows_of(texts):
    return [{"text": text} for text in texts]


def test_packing_equals_the_device_rule(tmp_path, write_jsonl, tokenizer, texts):
    """Guards that tier 1 and devices cut text alike, whatever the batching."""
    many = texts * 20
    assert len(many) > 2 * BATCH_RECORDS
    dataset = prepare_dataset(
        {"a": write_jsonl("a.jsonl", rows_of(many))}, tokenizer, seq_len=16, out_dir=tmp_path / "o"
    )
    expected = pack(many, load_tokenizer(tokenizer), 16)
    np.testing.assert_array_equal(dataset.tokens(), expected)
    assert dataset.n_rows == len(expected)
    assert dataset.n_tokens == 16 * len(expected)
    assert dataset.n_bytes == sum(len(text.encode()) for text in many)


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
    assert [(record["file"], record["line"]) for record in records] == [("mixed.jsonl", line) for line in range(2, 8)]
    assert all(set(record) == {"file", "line", "reason"} for record in records)
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


def test_the_cache_is_keyed_by_content(tmp_path, write_jsonl, tokenizer, texts, monkeypatch):
    """Guards that equal inputs are not packed twice, and that any changed input is packed anew."""
    path, out = write_jsonl("a.jsonl", [*rows_of(texts), {"text": ""}]), tmp_path / "out"
    first = prepare_dataset({"a": path}, tokenizer, seq_len=16, out_dir=out)
    monkeypatch.setattr("tier1.training.data.load_tokenizer", lambda data: pytest.fail("packed again"))
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
    assert not list((tmp_path / "out").glob("*.stream"))


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
    """The token stream fits and its rows do not: a line with the remedy, not the SIGBUS of a sparse mapping."""
    source, small = write_jsonl("a.jsonl", rows_of(texts * 20)), tmp_path / "small"
    whole = prepare_dataset({"a": source}, tokenizer, seq_len=16, out_dir=tmp_path / "whole")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    size = int(whole.path.stat().st_size * 1.5)
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
    old, young = out / "aa.1.stream", out / "bb.2.tmp"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    prepare_dataset({"a": write_jsonl("a.jsonl", rows_of(texts))}, tokenizer, seq_len=16, out_dir=out)
    assert not old.exists()
    assert young.exists()

"""Bad lines are set aside by name, and packing loses and repeats no token."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fednested_lib.errors import DataError, SnapshotError
from fednested_lib.text import BadRow, Row, end_of_text_id, load_tokenizer, pack, read_jsonl, read_texts, require_text


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json):
    return load_tokenizer(tokenizer_json)


def test_reads_both_shapes_and_names_bad_lines(tmp_path):
    """Each unusable line is returned with file, line and reason, and the good ones around it are kept."""
    lines = [
        b'\xef\xbb\xbf{"text": "with a byte order mark"}',
        b'{"prompt": "to be", "completion": "or not"}',
        b"",
        b"{not json",
        b'{"text": "latin \xe9"}',
        b"[1, 2]",
        b'{"text": 7}',
        b'{"text": "  "}',
        b'{"title": "x"}',
        b'{"prompt": "p"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": null}',
        b'{"text": "last", "id": 4}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    records = list(read_jsonl(path))
    good = [(row.line, row.text) for row in records if isinstance(row, Row)]
    bad = {row.line: row.reason for row in records if isinstance(row, BadRow)}
    assert good == [(1, "with a byte order mark"), (2, "to be\nor not"), (14, "last")]
    assert bad == {
        4: "not JSON",
        5: "not UTF-8",
        6: "not a JSON object",
        7: "text is not a string",
        8: "text is empty",
        9: 'neither "text" nor "prompt" and "completion"',
        10: 'neither "text" nor "prompt" and "completion"',
        11: "text has a lone surrogate",
        12: "not JSON",
        13: 'neither "text" nor "prompt" and "completion"',
    }
    assert all(row.file == str(path) for row in records)


@pytest.mark.parametrize("content", [None, b"", b"\n \n"])
def test_missing_or_empty_file_is_an_error(tmp_path, content):
    """A file without a record stops with its path, at the call and not at the first use."""
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        read_jsonl(path)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        require_text(path)


def test_only_bad_lines_is_an_error(tmp_path):
    """A device without one usable record stops, and says why the first one is not."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\n{}")
    with pytest.raises(DataError, match=r"no usable record, 2 bad \(line 1: not UTF-8\)"):
        read_texts(path)
    with pytest.raises(DataError, match="no usable record"):
        require_text(path)
    path.write_bytes(b'\xff\n{"text": "good"}')
    require_text(path)


def test_pack_predicts_every_token_once(tokenizer):
    """Rows overlap by one token, so the targets of all rows are the stream without its first token and its rest."""
    texts = ["the cat sat", "on the mat", "the cat sat on the mat"]
    stream = []
    for text in texts:
        stream += [*tokenizer.encode(text).ids, end_of_text_id(tokenizer)]
    rows = pack(texts, tokenizer, seq_len=5)
    assert rows.dtype == np.int32
    assert rows.shape == ((len(stream) - 1) // 5, 6)
    assert rows[:, 1:].reshape(-1).tolist() == stream[1 : 1 + rows.shape[0] * 5]
    assert rows[:, :-1].reshape(-1).tolist() == stream[: rows.shape[0] * 5]


def test_too_little_text_is_an_error(tokenizer):
    """Less than one row of text names both lengths."""
    with pytest.raises(DataError, match="needs at least 101"):
        pack(["the cat"], tokenizer, seq_len=100)
    with pytest.raises(DataError, match=r"^a\.jsonl has \d+ tokens.* lower evaluation\.seq_len$"):
        pack(["the cat"], tokenizer, seq_len=100, source="a.jsonl", key="evaluation.seq_len")
    with pytest.raises(DataError, match="has 0 tokens"):
        pack([], tokenizer, seq_len=8)


def test_tokenizer_must_parse_and_end_texts(tokenizer):
    """Garbage is no tokenizer, and one without an end-of-text token is refused."""
    with pytest.raises(SnapshotError, match="cannot be parsed"):
        load_tokenizer(b"{}")
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = []
    document["model"]["vocab"]["<other>"] = document["model"]["vocab"].pop("<|endoftext|>")
    with pytest.raises(DataError, match="no end-of-text token"):
        end_of_text_id(load_tokenizer(json.dumps(document).encode()))

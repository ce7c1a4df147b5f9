from __future__ import annotations

import json

import pytest

from examples.shakespeare.corpus import parse_play, prepare, prepare_from_files, read_plays
from fednested_lib.errors import DataError

PLAY = """# A Play

## ACT I

_Enter BOTH_

**FIRST LORD**
A line _Aside_ spoken
another line ... 12

_Exit_

still the first lord

**SECOND**
_He dies._

## ACT II
not spoken by anybody
**SECOND**
Last words.
"""


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def long_texts(path):
    """Texts too long to be spoken twice ("No, my lord." is)."""
    return {row["text"] for row in rows(path) if len(row["text"]) > 120}


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("plays"), 0)


def write_rows(path, n, stem="row"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{path.stem} {stem} {i}"}) + "\n" for i in range(n)), encoding="utf-8")


def test_a_speech_is_what_is_spoken():
    """Guards that headings, stage directions and line numbers never become training text."""
    speeches = list(parse_play(PLAY, genre="g", play="p"))
    assert [(s.speaker, s.text) for s in speeches] == [
        ("First Lord", "A line spoken\nanother line\nstill the first lord"),
        ("Second", "Last words."),
    ]
    assert len({s.place for s in speeches}) == 2


def test_all_plays_are_found():
    """Guards against a package layout that silently yields fewer plays."""
    speeches = list(read_plays())
    assert len({s.play for s in speeches}) == 38
    assert {s.genre for s in speeches} == {"comedies", "histories", "problems", "roman", "romances", "tragedies"}
    assert len(speeches) > 30_000


def test_equal_seeds_give_equal_files(plays, tmp_path):
    """Guards that the demo's data is a function of the seed, and that the seed matters."""
    again, other = prepare(tmp_path / "again", 0), prepare(tmp_path / "other", 1)
    for name, path in plays.suites.items():
        assert path.read_bytes() == again.suites[name].read_bytes()
        assert path.read_bytes() != other.suites[name].read_bytes()
    assert plays.tier1.read_bytes() == again.tier1.read_bytes()


def test_nothing_held_out_is_trained_on(plays):
    """Guards against leakage: a held-out speech is in no train file, neither tier 1's nor any device's."""
    held_out = set().union(*(long_texts(path) for path in plays.suites.values()))
    trained = set().union(*(long_texts(path) for path in [plays.tier1, *plays.devices.values()]))
    assert held_out
    assert trained
    assert not held_out & trained


def test_devices_are_seven_speakers_of_the_other_genres(plays):
    """Guards the non-IID set-up: one voice per device, none of them in tier 1's text, about a fifth held out."""
    assert len(plays.devices) == 7
    tier1 = long_texts(plays.tier1)
    for client, path in plays.devices.items():
        train, held_out = rows(path), rows(plays.suites[f"device-{client}"])
        assert len({row["text"].split("\n")[0] for row in train + held_out}) == 1
        assert 0.1 < len(held_out) / (len(train) + len(held_out)) < 0.35
        assert not long_texts(path) & tier1
    assert {name for name in plays.suites if name.startswith("genre-")} == {
        f"genre-{g}" for g in ("comedies", "histories", "problems", "roman", "romances", "tragedies")
    }


def test_a_name_of_several_speakers_carries_the_play(tmp_path):
    """Guards that the three Falstaffs, and everybody else, stay different devices."""
    corpus = prepare(tmp_path, 0, n_devices=60)
    assert len(corpus.devices) == 60
    assert {"falstaff-henry-iv-part-1", "falstaff-henry-iv-part-2"} <= set(corpus.devices)


def test_a_second_layout_leaves_no_file_of_the_first(tmp_path):
    """Guards a re-run with fewer devices against a leftover device of the earlier one."""
    prepare(tmp_path, 0, n_devices=3)
    kept = prepare(tmp_path, 0, n_devices=2)
    assert {path.parent.name for path in tmp_path.glob("devices/*/train.jsonl")} == set(kept.devices)
    assert {path.stem for path in tmp_path.glob("suites/*.jsonl")} == set(kept.suites)


@pytest.mark.parametrize(("options", "message"), [({"n_devices": 0}, "got 0"), ({"tier1_genre": "farces"}, "'farces'")])
def test_impossible_layouts_are_refused(tmp_path, options, message):
    """Guards that a wrong option is named with its bound."""
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, 0, **options)


def test_own_files_become_devices_and_share_their_first_fifth(tmp_path):
    """Guards the split of user data without tier1.jsonl: each row is in one file, the first fifth in tier 1's."""
    write_rows(tmp_path / "in" / "My Device.jsonl", 50)
    write_rows(tmp_path / "in" / "other.jsonl", 50)
    corpus = prepare_from_files(tmp_path / "in", tmp_path / "out", seq_len=1)
    assert set(corpus.devices) == {"my-device", "other"}
    files = [corpus.tier1, *corpus.devices.values(), *corpus.suites.values()]
    texts = [row["text"] for path in files for row in rows(path)]
    assert len(texts) == len(set(texts)) == 100
    shared = {row["text"] for path in (corpus.tier1, corpus.suites["tier1"]) for row in rows(path)}
    assert shared == {f"{stem} row {i}" for stem in ("My Device", "other") for i in range(10)}


def test_a_tier1_file_is_no_device_and_spares_the_devices(tmp_path):
    """Guards that with tier1.jsonl no row of a device leaves it."""
    write_rows(tmp_path / "in" / "tier1.jsonl", 20)
    write_rows(tmp_path / "in" / "a.jsonl", 20)
    corpus = prepare_from_files(tmp_path / "in", tmp_path / "out", seq_len=1)
    assert set(corpus.devices) == {"a"}
    assert all(row["text"].startswith("tier1") for path in (corpus.tier1, corpus.suites["tier1"]) for row in rows(path))
    assert len(rows(corpus.devices["a"])) + len(rows(corpus.suites["device-a"])) == 20


def test_prompt_and_completion_become_text_and_bad_rows_are_set_aside_without_their_value(tmp_path):
    """Guards that an unreadable row is reported by place and reason only, and does not stop the others."""
    path = tmp_path / "in" / "a.jsonl"
    write_rows(path, 20, stem="longer row")
    with path.open("ab") as file:
        file.write(b'{"prompt": "p", "completion": "c"}\nsecret words\n\xff\xfe\n')
    corpus = prepare_from_files(tmp_path / "in", tmp_path / "out", seq_len=1)
    assert corpus.n_set_aside == 2
    set_aside = (tmp_path / "out" / "set_aside.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["line"] for line in set_aside.splitlines()] == [22, 23]
    assert "secret" not in set_aside
    everything = [row for p in [*corpus.devices.values(), *corpus.suites.values(), corpus.tier1] for row in rows(p)]
    assert {"text": "p\nc"} in everything


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "does not exist"),
        ({}, "has 0 device files, needs at least 1"),
        ({"a.jsonl": 9}, "has 9 readable rows, needs at least 10"),
        ({"a.jsonl": 0}, "a.jsonl"),
        ({"A b.jsonl": 20, "a-b.jsonl": 20}, "both name client 'a-b'"),
        ({"---.jsonl": 20}, "gives no client name"),
    ],
)
def test_unusable_data_directories_are_refused(tmp_path, files, message):
    """Guards that wrong user data is one line with value, bound and remedy."""
    for name, n in (files or {}).items():
        write_rows(tmp_path / "in" / name, n)
    if files == {}:
        (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=message):
        prepare_from_files(tmp_path / "in", tmp_path / "out", seq_len=1)


@pytest.mark.parametrize(
    ("short", "use"),
    [("b.jsonl", "the held-out lines"), ("tier1.jsonl", "tier 1's held-out lines")],
)
def test_a_file_with_too_little_text_is_named_before_anything_starts(tmp_path, short, use):
    """Guards that a short file is named with what it has and needs, and not by an evaluation minutes later."""
    for name in ("a.jsonl", "b.jsonl", "tier1.jsonl"):
        n = 100 if name == short else 400
        write_rows(tmp_path / "in" / name, n)
    with pytest.raises(DataError, match=rf"{short} gives {use} \d+ rows with \d+ bytes of text, needs at least 388"):
        prepare_from_files(tmp_path / "in", tmp_path / "out", seq_len=96)
    assert not (tmp_path / "out").exists()


def test_shared_rows_that_are_too_few_together_name_the_directory(tmp_path):
    """Guards tier 1's part when it is made of a fifth of every device's rows."""
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / "in" / name, 400)
    with pytest.raises(DataError, match=r"/in gives tier 1's held-out lines .* needs at least \d+"):
        prepare_from_files(tmp_path / "in", tmp_path / "out", seq_len=96)

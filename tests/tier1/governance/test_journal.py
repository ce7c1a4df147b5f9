"""The journal loses nothing that it acknowledged and shows nothing that it did not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fednested_lib.errors import GovernanceError, StorageError
from tier1.governance.journal import Journal

RECORDS = [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("torn", [b'{"n":3', b"\x00" * 9000, b'{"n":3}'])
def test_a_torn_tail_is_cut_off_and_the_rest_kept(tmp_path: Path, torn: bytes):
    """What a dying process left of a line is neither read nor glued to the next record."""
    journal = Journal(tmp_path / "j.jsonl")
    journal.append(RECORDS)
    with open(journal.path, "ab") as file:
        file.write(torn)
    assert list(journal.read()) == RECORDS
    journal.append([{"n": 4}])
    assert list(journal.read()) == [*RECORDS, {"n": 4}]


@pytest.mark.parametrize("damage", [b"garbage\n", b"[1]\n", b"\n"])
def test_a_damaged_line_is_an_alteration(tmp_path: Path, damage: bytes):
    """A whole line that is no record stops the reader and is named by file and number."""
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"n":1}\n' + damage + b'{"n":2}\n')
    with pytest.raises(GovernanceError, match=r"j\.jsonl line 2"):
        list(Journal(path).read())


def test_a_full_disk_is_a_storage_error():
    """A full disk is named as such."""
    with pytest.raises(StorageError, match="disk full"):
        Journal("/dev/full").append(RECORDS)


def test_a_batch_that_fits_half_way_leaves_nothing(tmp_path: Path):
    """If the file system takes only part of a batch, the part is taken back."""
    path = tmp_path / "j.jsonl"
    script = (
        "import resource, signal; from tier1.governance.journal import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"journal = Journal({str(path)!r}); journal.append([{{'n': 1}}])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30))\n"
        "try: journal.append([{'n': 2, 'pad': 'x'}, {'n': 3, 'pad': 'x' * 50}])\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert result.stdout == "StorageError\n"
    assert path.read_bytes() == b'{"n":1}\n'


def test_a_kill_while_writing_loses_only_the_record_of_that_call(tmp_path: Path):
    """A process killed between write and sync leaves a file that the next one goes on with."""
    path = tmp_path / "j.jsonl"
    script = f"from tier1.governance.journal import Journal; Journal({str(path)!r}).append([{{'n': 1}}])"
    environment = {**os.environ, "FEDNESTED_FAILPOINT": "journal.before_sync"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert result.returncode == -9
    Journal(path).append([{"n": 2}])
    assert [record["n"] for record in Journal(path).read()][-1] == 2


def test_writers_take_turns(tmp_path: Path):
    """Four processes appending at once leave every record whole and exactly once."""
    path = tmp_path / "j.jsonl"
    script = (
        "import sys; from tier1.governance.journal import Journal\n"
        f"journal = Journal({str(path)!r})\n"
        "for n in range(25): journal.append([{'writer': sys.argv[1], 'n': n, 'pad': 'x' * 3000}])\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(writer)]) for writer in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    seen = sorted((record["writer"], record["n"]) for record in Journal(path).read())
    assert seen == [(str(writer), n) for writer in range(4) for n in range(25)]


def test_choosing_and_appending_is_one_step(tmp_path: Path):
    """Four processes that each add what is not there yet add every record once: look and write are one step."""
    path = tmp_path / "j.jsonl"
    script = (
        "from tier1.governance.journal import Journal\n"
        f"journal = Journal({str(path)!r})\n"
        "for n in range(60):\n"
        "    journal.append_new(lambda stored: [] if n in [r['n'] for r in stored] else [{'n': n, 'pad': 'x' * 500}])\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert [record["n"] for record in Journal(path).read()] == list(range(60))

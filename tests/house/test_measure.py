"""Wall time and peak memory of a command, as `make demo` prints them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.results import ROOT

HOLD = "held = bytearray(150 * 2**20); held[::4096] = b'x' * len(held[::4096])"
# A parent and its child, each of which holds 150 MiB of pages of its own until both were measured.
TREE = f"""
import subprocess, sys, time
from pathlib import Path
CHILD = {HOLD + "; print('held', flush=True); input()"!r}
child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
{HOLD}
child.stdout.readline()
Path("held").touch()
while not Path("sampled").exists():
    time.sleep(0.02)
child.communicate("end")
"""
# The measurement itself, which says when it has looked at both.
TOLD = """
import sys
from pathlib import Path
from benchmarks import measure
look = measure.tree_bytes
def tree_bytes(pid):
    both = Path("held").exists()
    found = look(pid)
    if both:
        Path("sampled").touch()
    return found
measure.tree_bytes = tree_bytes
sys.exit(measure.main(sys.argv[1:]))
"""


def _command(code: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.measure", "the part", "--", sys.executable, "-c", code]


def test_peak_memory_is_that_of_all_processes_together(tmp_path: Path) -> None:
    """Two processes of 150 MiB at the same time count as 300, not as the larger of the two."""
    command = _command(TREE)
    command[1:3] = ["-c", TOLD]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    (peak_gib,) = re.findall(r"^the part: \d+ min \d\d s wall, ([\d.]+) GiB peak memory$", done.stdout, re.MULTILINE)
    assert 0.29 <= float(peak_gib) < 0.45


def test_the_exit_code_of_the_command_is_passed_on() -> None:
    """A demo that failed is a failed `make demo`, measured or not."""
    done = subprocess.run(_command("raise SystemExit(7)"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "the part: " in done.stdout


SLOW_SAMPLE = """
import sys, time
from benchmarks import measure
def tree_bytes(pid):
    time.sleep(0.3)
    return 1
measure.tree_bytes, measure.INTERVAL_S = tree_bytes, 0.01
sys.exit(measure.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("during", ["waiting", "sampling"])
def test_ctrl_c_lets_the_command_clean_up(during: str) -> None:
    """The measurement outlives a Ctrl-C, wherever it meets it, until the command has ended by itself."""
    code = """
import signal, sys, time
def clean_up(*_):
    time.sleep(0.5); print("cleaned up", flush=True); sys.exit(130)
signal.signal(signal.SIGINT, clean_up)
print("ready", flush=True)
time.sleep(600)
"""
    command = _command(code)
    if during == "sampling":
        command[1:3] = ["-c", SLOW_SAMPLE]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    # A terminal sends Ctrl-C to the whole group; start_new_session made a group of exactly these two processes.
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out.startswith("cleaned up\nthe part: ")

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def mine(marker: str) -> list[psutil.Process]:
    """Return the processes that have this directory in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(marker in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def wait_for(condition, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "examples.shakespeare", "--out", str(out), "--no-baseline"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_ctrl_c_and_kill_leave_nothing_behind_and_a_new_run_starts(tmp_path):
    """After SIGINT and SIGKILL no broker, server or device of the demo lives on; the same directory runs again."""
    out = tmp_path / "demo"
    for signum, code in [(signal.SIGINT, 130), (signal.SIGKILL, -9)]:
        demo = start(out)
        # the demo, its broker, MLflow, and the guard of each
        assert wait_for(lambda: len(mine(str(out))) >= 4 and (out / "home/chain").exists(), 180), mine(str(out))
        os.kill(demo.pid, signum)
        output, _ = demo.communicate(timeout=180)
        assert demo.returncode == code, output
        assert wait_for(lambda: not mine(str(out)), 90), mine(str(out))
    assert "Traceback" not in output


def test_a_directory_that_is_not_a_demo_is_left_alone(tmp_path):
    """The demo replaces only what an earlier demo made."""
    (tmp_path / "thesis.txt").write_text("mine")
    demo = start(tmp_path)
    output, _ = demo.communicate(timeout=180)
    assert demo.returncode == 2
    assert "choose another --out" in output
    assert (tmp_path / "thesis.txt").read_text() == "mine"

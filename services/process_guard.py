"""Runs one server process and ends it, with all its children, when it is told to or when its owner is gone.

    owner ── guard (leader of a new session and process group) ── server ── the server's own children

The guard watches the owner's process, not its thread (PR_SET_PDEATHSIG fires when the *thread* that forked ends), so
even SIGKILL of the owner leaves nothing behind. The server gets SIGTERM first and time to write its data, then SIGKILL.
If the guard itself is killed, Linux sends SIGTERM to the server.

Standard library only, run as a script with `python -I -S`: `process_guard.py OWNER_PID GRACE_S COMMAND…`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _everybody_gone(deadline: float) -> bool:
    """Reap children, and on Linux the orphans of children, until none is left or the deadline has passed."""
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            time.sleep(0.02)
    return False


def main(owner_pid: int, grace_s: float, command: list[str]) -> None:
    """Run `command` until it ends, a SIGTERM comes, or process `owner_pid` is no longer the parent."""
    stopping = False

    def stop(_signal: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    server = subprocess.Popen(  # the guard has one thread, so preexec_fn is safe here
        command, stdin=subprocess.DEVNULL, preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    )
    while not stopping and os.getppid() == owner_pid and server.poll() is None:
        time.sleep(0.05)
    os.killpg(os.getpgrp(), signal.SIGTERM)
    if not _everybody_gone(time.monotonic() + grace_s):
        os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])

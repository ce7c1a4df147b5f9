"""Run a command and say what it took: `python -m benchmarks.measure NAME -- COMMAND ...`.

Peak memory is the largest sum, over the command and all its descendants at one moment, of the proportional set size:
pages that processes share (torch's libraries above all) count once. Sampled twice a second; where there is no such
number it is the resident set size, which counts shared pages again and so errs on the high side.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil

INTERVAL_S = 0.5


def main(arguments: list[str]) -> int:
    """Run the command, print wall time and peak memory, return the command's exit code."""
    name, separator, command = arguments[0], arguments[1:2], arguments[2:]
    if separator != ["--"] or not command:
        print("usage: python -m benchmarks.measure NAME -- COMMAND ...", file=sys.stderr)
        return 2
    # The command gets the same Ctrl-C and cleans up; wherever it meets us, we only go on waiting for it. A handler, not
    # SIG_IGN, which the command would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    cost = watch(subprocess.Popen(command))
    print(
        f"{name}: {cost.wall_s // 60:.0f} min {cost.wall_s % 60:02.0f} s wall, {cost.peak_gib:.2f} GiB peak memory",
        flush=True,
    )
    return cost.code if cost.code >= 0 else 128 - cost.code


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a command took: exit code, wall time in seconds, peak memory of its process tree in GiB."""

    code: int
    wall_s: float
    peak_gib: float


def watch(process: subprocess.Popen, timeout_s: float = math.inf) -> Cost:
    """Wait for a process, sampling its memory.

    Raises:
        RuntimeError: it was not done after `timeout_s`; it has been asked to end, and has ended.
    """
    began, peak_bytes = time.monotonic(), 0
    while True:
        try:
            code = process.wait(timeout=INTERVAL_S)
            return Cost(code=code, wall_s=time.monotonic() - began, peak_gib=peak_bytes / 2**30)
        except subprocess.TimeoutExpired:
            peak_bytes = max(peak_bytes, tree_bytes(process.pid))
        if time.monotonic() - began > timeout_s:
            process.terminate()
            process.wait()
            raise RuntimeError(f"not done after {timeout_s:.0f} s: {process.args}")


def tree_bytes(pid: int) -> int:
    """Sum the memory of a process and its descendants."""
    try:
        root = psutil.Process(pid)
        return sum(_process_bytes(process) for process in [root, *root.children(recursive=True)])
    except psutil.Error:
        return 0


def _process_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0
    return getattr(memory, "pss", memory.rss)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run a command and say what it took: `python -m benchmarks.measure NAME -- COMMAND ...`.

Peak memory is the largest sum, over the command and all its descendants at one moment, of the proportional set size:
pages that processes share (torch's libraries above all) count once. Sampled twice a second; where there is no such
number it is the resident set size, which counts shared pages again and so errs on the high side.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil

INTERVAL_S = 0.5


def main(arguments: list[str]) -> int:
    """Run the command, print wall time and peak memory, return the command's exit code."""
    name, separator, command = arguments[0], arguments[1:2], arguments[2:]
    if separator != ["--"] or not command:
        print("usage: python -m benchmarks.measure NAME -- COMMAND ...", file=sys.stderr)
        return 2
    began, peak_bytes = time.monotonic(), 0
    # The command gets the same Ctrl-C and cleans up; wherever it meets us, we only go on waiting for it. A handler, not
    # SIG_IGN, which the command would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    process = subprocess.Popen(command)
    while True:
        try:
            code = process.wait(timeout=INTERVAL_S)
            break
        except subprocess.TimeoutExpired:
            peak_bytes = max(peak_bytes, tree_bytes(process.pid))
    wall_s = time.monotonic() - began
    print(
        f"{name}: {wall_s // 60:.0f} min {wall_s % 60:02.0f} s wall, {peak_bytes / 2**30:.2f} GiB peak memory",
        flush=True,
    )
    return code if code >= 0 else 128 - code


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

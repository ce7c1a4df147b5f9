"""Runs a task's registered container command as a process group of its own, in a fresh directory, bounded in time.

    ColdPods   the command itself, as a container would start it: imports of seconds
    WarmPods   the same command in a fork of a process that has imported the third-party packages already

Both get the pod's environment and nothing of this process's but what `base` says.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

WARM = Path(__file__).with_name("warm_pods.py")
SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True, kw_only=True)
class Pod:
    """One container to run.

    Args:
        command: the registered one, its templates filled in.
        directory: working directory, empty.
        environment: all of it.
        log: takes standard output and error.
    """

    command: list[str]
    directory: Path
    environment: Mapping[str, str]
    log: Path


class Pods(Protocol):
    """Where containers run."""

    def run(self, pod: Pod, timeout_s: float | None) -> int | None:
        """Run a pod and return its exit status, negative for a signal; None after killing one that takes too long."""


def base_environment(scratch: Path) -> dict[str, str]:
    """Return what every pod has: an image's environment, with temporary files where they can be removed."""
    return {
        "PATH": f"{SCRIPTS}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }


def end_group(pid: int) -> None:
    """Kill a process group that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class ColdPods:
    """Starts every command anew."""

    def run(self, pod: Pod, timeout_s: float | None) -> int | None:
        """See `Pods.run`."""
        with open(pod.log, "ab") as log:
            process = subprocess.Popen(
                pod.command,
                cwd=pod.directory,
                env=dict(pod.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(process.pid)
            process.wait()


class WarmPods:
    """Forks every pod from one process that has imported what images hold; it ends with this object or this process.

    Args:
        log: takes what that process prints.
    """

    def __init__(self, log: Path):
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(WARM)],
                env=base_environment(log.parent),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,
            )
        self._log, self._numbers, self._lock = log, itertools.count(), threading.Lock()
        self._ends: dict[int, threading.Event] = {}
        self._pids: dict[int, int] = {}
        self._statuses: dict[int, int] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(self, pod: Pod, timeout_s: float | None) -> int | None:
        """See `Pods.run`."""
        number, ended = next(self._numbers), threading.Event()
        self._ends[number] = ended
        order = {
            "number": number,
            "command": pod.command,
            "directory": str(pod.directory),
            "environment": dict(pod.environment),
            "log": str(pod.log),
        }
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        in_time = ended.wait(timeout_s)
        if not in_time:
            end_group(self._pids[number])
            ended.wait()
        if number not in self._statuses:
            raise RuntimeError(f"the process that forks pods ended, see {self._log}")
        return self._statuses[number] if in_time else None

    def close(self) -> None:
        """End the process and every pod that runs."""
        self._process.stdin.close()
        self._process.wait(20)
        self._reader.join()

    def _read(self) -> None:
        for line in self._process.stdout:
            told = json.loads(line)
            if "pid" in told:
                self._pids[told["number"]] = told["pid"]
            else:
                self._statuses[told["number"]] = told["status"]
                self._ends[told["number"]].set()
        for ended in self._ends.values():
            ended.set()

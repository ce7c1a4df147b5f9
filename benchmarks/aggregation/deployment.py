"""flwr as it is deployed: a SuperLink, one SuperNode per client and `flwr run`, all of flwr 1.42, on loopback.

A reply goes ClientApp → SuperNode → SuperLink → ServerApp, over HTTP, an object at a time (an Array and its chunks are
objects of their own). Timed is from a client's first `Array(…)` to the end of FedAvg's `aggregate_train`: not the start
of processes, not what the server sends down.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from benchmarks.aggregation.environment import PeerMissing, interpreter
from benchmarks.aggregation.worker import HERE, QUIET
from benchmarks.results import ROOT

START_S, GRACE_S, ROUND_S = 60, 10, 3600
GUARD = ROOT / "services" / "process_guard.py"  # ends the whole group, grandchildren too, also when we are killed
CONNECTION = """[superlink]
default = "bench"
[superlink.bench]
address = "127.0.0.1:{port}"
insecure = true
"""


class Deployment:
    """A context manager around the processes.

    Args:
        paths: `client-<n>.npz` of every client, all in one directory.
    """

    def __init__(self, paths: Sequence[Path]):
        self._programs = interpreter("flwr").parent
        self._directory, self._clients = paths[0].parent, len(paths)
        self._home = self._directory / "flwr-home"
        self._rounds = 0
        self._stack = ExitStack()

    def __enter__(self) -> Deployment:
        self._home.mkdir()
        port = _free_port()
        (self._home / "config.toml").write_text(CONNECTION.format(port=port))
        try:
            link = self._start("flower-superlink", "--insecure", "--port", str(port))
            _wait(link, "flower-superlink", lambda: _listens(port))
            for client in range(self._clients):
                place = ["--superlink", f"127.0.0.1:{port}", "--port", str(_free_port())]
                self._start("flower-supernode", "--insecure", *place, "--node-config", f"partition-id={client}")
            config = f'directory="{self._directory}" clients={self._clients}'
            submit = [str(self._programs / "flwr"), "run", str(HERE / "flwr_app"), "bench", "--run-config", config]
            if subprocess.run(submit, capture_output=True, env=self._environment(), check=False).returncode != 0:
                raise PeerMissing(f"flwr run failed: see {self._home}/*.log, run it by hand in flwr's environment")
        except BaseException:
            self._stack.close()
            raise
        return self

    def round(self) -> dict[str, float]:
        """Run one round and return its seconds.

        Raises:
            PeerMissing: no answer, or a client failed.
        """
        done = self._directory / f"done-{self._rounds}.json"
        (self._directory / f"go-{self._rounds}").touch()
        deadline = time.monotonic() + ROUND_S
        while not done.exists():
            if time.monotonic() > deadline:
                raise PeerMissing(f"flwr's round was not done after {ROUND_S} s: see {self._home}/*.log")
            time.sleep(0.2)
        self._rounds += 1
        found = json.loads(done.read_text())
        if "error" in found:
            raise PeerMissing(f"flwr's round failed, saying {found['error'][:200]}: see {self._home}/*.log")
        return found

    def __exit__(self, *_exception) -> None:
        (self._directory / "stop").touch()
        self._stack.close()

    def _start(self, program: str, *arguments: str) -> subprocess.Popen:
        log = self._stack.enter_context((self._home / f"{program}-{len(os.listdir(self._home))}.log").open("wb"))
        guard = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), str(GRACE_S)]
        process = subprocess.Popen(
            [*guard, str(self._programs / program), *arguments],
            stdout=log,
            stderr=log,
            env=self._environment(),
            cwd=self._home,
            start_new_session=True,
        )
        self._stack.callback(_end, process)
        return process

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(self._home)}
        environment["PATH"] = f"{self._programs}{os.pathsep}{environment['PATH']}"
        environment.pop("PYTHONPATH", None)
        return environment


def _end(process: subprocess.Popen) -> None:
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(GRACE_S + 5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for each in family:  # an app in the middle of a round is in a session of its own and goes on asking
        with contextlib.suppress(psutil.Error):
            each.kill()


def _wait(process: subprocess.Popen, name: str, ready) -> None:
    deadline = time.monotonic() + START_S
    while not ready():
        if process.poll() not in (None, 0) or time.monotonic() > deadline:
            raise PeerMissing(f"{name} did not come up within {START_S} s: run it by hand in flwr's environment")
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

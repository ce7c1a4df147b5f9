"""A peer's process: started once, asked a command at a time, so that both sides are timed in turn in one run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.aggregation.environment import PeerMissing, interpreter

HERE = Path(__file__).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}


class Worker:
    """A context manager around `<peer>_worker.py` in the peer's environment.

    Args:
        peer: `flwr` or `nvflare`.
        paths: one .npz per client.
    """

    def __init__(self, peer: str, paths: Sequence[Path]):
        self.peer = peer
        self._command = [str(interpreter(peer)), str(HERE / f"{peer}_worker.py"), *map(str, paths)]

    def __enter__(self) -> Worker:
        environment = {**os.environ, **QUIET}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def ask(self, command: str) -> dict[str, Any]:
        """Send one command and return its answer.

        Raises:
            PeerMissing: the process ended; the message has its last line.
        """
        with contextlib.suppress(BrokenPipeError):
            print(command, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            said = self._process.stderr.read().strip().splitlines() or ["nothing"]
            raise PeerMissing(f"{self.peer}'s process ended, saying {said[-1][:200]}: see {self._command[1]}")
        return json.loads(line)

    def __exit__(self, *_exception) -> None:
        self._process.stdin.close()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            pipe.close()

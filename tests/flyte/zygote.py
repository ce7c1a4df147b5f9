"""A process that has imported flytekit already and forks one server at a time, so that fifty starts take seconds.

    python -m tests.flyte.zygote trigger|connector      then lines on standard input:
    start {"argv": […], "env": {…}}   →  the child's pid
    wait                              →  its exit status, negative when a signal ended it

The child runs the command's own entry point; only the imports before it are shared.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """The other end of the pipe: starts, kills and stops the one child.

    Args:
        kind: `trigger` or `connector`.
        arguments: command line of the child.
        environment: added to this process's.
        log: file that takes what the children print.
    """

    def __init__(self, kind: str, arguments: list[str], environment: dict[str, str], log: Path):
        self._arguments, self._log = arguments, log
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.flyte.zygote", kind],
                cwd=ROOT,
                env={
                    **os.environ,
                    **environment,
                    "PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self.pid = 0

    def start(self, **environment: str) -> None:
        """Fork a child."""
        self.pid = int(self._ask("start " + json.dumps({"argv": self._arguments, "env": environment})))

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to the child and return its exit status."""
        os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the child and return its exit status."""
        return int(self._ask("wait"))

    def _ask(self, line: str) -> str:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the zygote ended: {self._log.read_text()[-1000:]}")
        return answer

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # the zygote ends its child and itself
        self._process.wait(90)


def _preload(kind: str):
    if kind == "trigger":
        import flytekit.remote

        import tier1.federation
        from services.trigger.__main__ import main

        return main
    import flytekit.extend.backend.connector_service
    import flytekit.extras.webhook  # noqa: F401
    from flytekit.clis.sdk_in_container.pyflyte import main

    import tier1.federation
    import tier1.loops.window  # noqa: F401

    return main


def _serve(kind: str) -> None:
    main = _preload(kind)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a child prints is not an answer
    assert threading.active_count() == 1, "a fork would copy a lock that a thread holds"
    child = 0
    for line in sys.stdin:
        if line.startswith("start "):
            order = json.loads(line.removeprefix("start "))
            child = os.fork()
            if child == 0:
                os.environ.update(order["env"])
                sys.argv = [kind, *order["argv"]]
                main()
                os._exit(0)
            print(child, file=answers, flush=True)
        else:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
            child = 0
    if child:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    _serve(sys.argv[1])

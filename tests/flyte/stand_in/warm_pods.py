"""A process that has imported the third-party packages of the images and forks one pod per line of standard input.

    {"number", "command", "directory", "environment", "log"}   →   {"number", "pid"}, then {"number", "status"}

A fork does what `pyflyte-fast-execute` does: it unpacks the distribution, puts it first on the path and runs the rest
of the command. Nothing of this repository is imported before that, so a pod runs the code that was registered.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import select
import signal
import sys
import threading
import traceback

PACKAGES = (
    "flytekit",
    "flytekit.bin.entrypoint",
    "flytekit.tools.fast_registration",
    "flytekit.core.array_node_map_task",
    "flytekit.types.file",
    "flytekit.types.directory",
    "flytekit.types.error.error",
    "flytekit.sensor.base_sensor",
    "flytekit.extend.backend.base_connector",
    "flytekitplugins.kfpytorch",
    "numpy",
    "torch",
    "torch._dynamo",
    "transformers",
    "transformers.models.mixtral.modeling_mixtral",
    "confluent_kafka",
    "confluent_kafka.admin",
    "cramjam",
    "cryptography.hazmat.primitives.asymmetric.ed25519",
    "pandas",
    "pandera.pandas",
    "pyarrow",
    "pydantic",
    "safetensors.numpy",
    "structlog",
    "tokenizers",
    "tqdm",
    "yaml",
)
OURS = ("tasks", "workflows", "launchplans", "images", "tier1", "services", "fednested_lib", "tests")


def main() -> None:
    """Fork until the input ends, then end what still runs."""
    sys.path.pop(0)  # this directory
    for name in PACKAGES:
        importlib.import_module(name)
    assert not [name for name in sys.modules if name.split(".")[0] in OURS], "a pod would run another checkout's code"
    assert threading.active_count() == 1, "a fork would copy a lock that a thread holds"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, int] = {}
    while True:
        readable, _, _ = select.select([0, wake], [], [])
        if wake in readable:
            os.read(wake, 4096)
            _reap(children, answers)
        if 0 in readable and not _obey(children, answers):
            break
    for pid in children:
        os.killpg(pid, signal.SIGKILL)


def _reap(children: dict[int, int], answers) -> None:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            told = {"number": children.pop(pid), "status": os.waitstatus_to_exitcode(status)}
            print(json.dumps(told), file=answers, flush=True)


_rest = b""


def _obey(children: dict[int, int], answers) -> bool:
    """Read what is there, fork a pod per whole line; tell whether the input goes on."""
    global _rest
    data = os.read(0, 1 << 16)
    *lines, _rest = (_rest + data).split(b"\n")
    for line in lines:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become_pod(order)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # here too: who kills the group must find it
        children[pid] = order["number"]
        print(json.dumps({"number": order["number"], "pid": pid}), file=answers, flush=True)
    return bool(data)


def _become_pod(order: dict) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(order["directory"])
        os.environ.clear()
        os.environ.update(order["environment"])
        random.seed()  # flytekit draws names from it
        _execute(order["command"])
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _execute(command: list[str]) -> None:
    from flytekit.bin import entrypoint

    if command[0] == "pyflyte-fast-execute":
        command = _unpack(command)
    commands = {
        "pyflyte-execute": entrypoint.execute_task_cmd,
        "pyflyte-map-execute": entrypoint.map_execute_task_cmd,
    }
    sys.argv = command
    commands[command[0]].main(args=command[1:], standalone_mode=False)


def _unpack(command: list[str]) -> list[str]:
    from flytekit.tools.fast_registration import download_distribution

    distribution = command[command.index("--additional-distribution") + 1]
    destination = os.path.realpath(command[command.index("--dest-dir") + 1])
    download_distribution(distribution, destination)
    sys.path.insert(0, destination)
    os.environ["PYTHONPATH"] = destination
    rest = command[command.index("--") + 1 :]
    resolver = rest.index("--resolver")
    dynamic = ["--dynamic-addl-distro", distribution, "--dynamic-dest-dir", destination]
    return rest[:resolver] + dynamic + rest[resolver:]


if __name__ == "__main__":
    main()

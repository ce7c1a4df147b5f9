"""The embedded servers: up when they say so, gone when their owner is gone, and nothing lost by a stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fednested_lib.errors import StorageError, TransportError
from fednested_lib.log import KafkaLog
from services import embedded
from services.embedded import EmbeddedBroker, EmbeddedMlflow, bootstrap_servers


def _members(directory: Path) -> list[str]:
    """Return the command lines of living processes that were started for `directory`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in command and str(os.getpid()) != path.parent.name:
            found.append(command)
    return found


def _eventually(condition: Callable[[], bool], timeout_s: float = 90) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _owner(code: str, directory: Path) -> tuple[subprocess.Popen, str]:
    """Start a process that owns a server and return it with the address that it prints."""
    script = "import sys, time\nfrom services.embedded import EmbeddedBroker, EmbeddedMlflow\n" + textwrap.dedent(code)
    checkout = Path(embedded.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(directory)], cwd=checkout, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


BROKER_OWNER = """
    from fednested_lib.log import KafkaLog
    broker = EmbeddedBroker(sys.argv[1]).start()
    log = KafkaLog(broker.bootstrap, timeout_s=60)
    log.create_topics({"t": 1})
    for i in range(50):
        log.append("t", key=b"k", value=b"%d" % i, headers={})
    print(broker.bootstrap, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_broker_dies_with_its_owner_and_keeps_its_data(tmp_path: Path, kill: signal.Signals):
    """However the owner ends, no process and no busy port stays behind, and what was acknowledged is there."""
    owner, bootstrap = _owner(BROKER_OWNER, tmp_path / "b")
    os.kill(owner.pid, kill)
    owner.wait(90)
    assert _eventually(lambda: not _members(tmp_path)), _members(tmp_path)
    host, port = bootstrap.split(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, int(port)))
    with EmbeddedBroker(tmp_path / "b") as broker:
        assert KafkaLog(broker.bootstrap, timeout_s=60).watermarks("t") == {0: (0, 50)}


def test_a_second_start_waits_for_the_first_to_finish_writing(tmp_path: Path):
    """A re-run right after a kill must neither fail nor run two brokers on one directory."""
    owner, _ = _owner(BROKER_OWNER, tmp_path / "b")
    owner.kill()
    with EmbeddedBroker(tmp_path / "b") as broker:  # at once
        assert KafkaLog(broker.bootstrap, timeout_s=60).watermarks("t") == {0: (0, 50)}
    owner.wait(90)


def test_a_guard_that_is_killed_takes_the_broker_with_it(tmp_path: Path):
    """Even the loss of the process that watches leaves nothing behind."""
    broker = EmbeddedBroker(tmp_path / "b").start()
    broker._guard.kill()
    assert _eventually(lambda: not _members(tmp_path)), _members(tmp_path)
    broker.stop()


def test_a_broker_outlives_the_thread_that_started_it(tmp_path: Path):
    """The kernel's parent-death signal fires when a thread ends; ours must watch the process."""
    broker = EmbeddedBroker(tmp_path / "b")
    thread = threading.Thread(target=broker.start)
    thread.start()
    thread.join()
    time.sleep(0.5)
    assert broker.running
    KafkaLog(broker.bootstrap, timeout_s=60).create_topics({"t": 1})
    broker.stop()
    assert not _members(tmp_path)


def test_one_directory_has_one_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two brokers would overwrite each other's data file."""
    monkeypatch.setattr(embedded, "_LOCK_WAIT_S", 0.2)
    with EmbeddedBroker(tmp_path), pytest.raises(StorageError, match="already runs on"):
        EmbeddedBroker(tmp_path).start()


def test_a_port_that_is_taken_is_said_with_the_servers_own_words(tmp_path: Path):
    """A server that does not come up is one line with the end of its log, at once."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        begin = time.monotonic()
        with pytest.raises(TransportError, match=rf"did not come up on 127\.0\.0\.1:{port}.*already in use") as error:
            EmbeddedBroker(tmp_path, port=port).start()
    assert time.monotonic() - begin < EmbeddedBroker.start_timeout_s  # it did not wait for an answer
    assert "\n" not in str(error.value)
    assert not _members(tmp_path)


def test_an_external_broker_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """FEDNESTED_KAFKA_BOOTSTRAP replaces the embedded broker, which is then not even started."""
    monkeypatch.setenv("FEDNESTED_KAFKA_BOOTSTRAP", "kafka.example:9092")
    with bootstrap_servers(tmp_path / "b") as servers:
        assert servers == "kafka.example:9092"
    assert not (tmp_path / "b").exists()
    monkeypatch.delenv("FEDNESTED_KAFKA_BOOTSTRAP")
    with bootstrap_servers(tmp_path / "b") as servers:
        assert servers.startswith("127.0.0.1:")
    assert not _members(tmp_path)


@pytest.mark.slow
def test_mlflow_serves_a_registry_and_leaves_nothing_behind(tmp_path: Path):
    """A model registered on the real server survives SIGKILL of the owner; that and `stop` end every process."""
    from mlflow import MlflowClient

    owner, uri = _owner(
        "server = EmbeddedMlflow(sys.argv[1]).start()\nprint(server.uri, flush=True)\ntime.sleep(600)", tmp_path / "m"
    )
    MlflowClient(uri).create_registered_model("fednested")
    assert not any("mlflow.server.jobs" in command or "huey_consumer" in command for command in _members(tmp_path))
    owner.kill()
    owner.wait(90)
    assert _eventually(lambda: not _members(tmp_path)), _members(tmp_path)
    with EmbeddedMlflow(tmp_path / "m") as server:
        assert MlflowClient(server.uri).get_registered_model("fednested").name == "fednested"
    assert not _members(tmp_path)

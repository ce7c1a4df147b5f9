"""A real Kafka broker and a real MLflow server on loopback, for the demo, tests and laptops.

Each runs under `process_guard` in a process group of its own: a Ctrl-C on the terminal does not reach it, `stop` ends
the whole group, and when the owner dies, by SIGKILL too, so does the group. The guard holds a lock on the data
directory until everything is gone, so a quick re-run waits instead of starting a second server on the same data.

The broker (noida-db) writes its data about once a second and when it gets SIGTERM, all of it in one file. `stop` sends
SIGTERM and waits, so a stop loses nothing; SIGKILL of the broker itself loses what it acknowledged in the last second.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fednested_lib.config import LogConfig
from fednested_lib.errors import ConfigError, StorageError, TransportError

HOST = "127.0.0.1"
_GUARD = Path(__file__).with_name("process_guard.py")
_LOCK_WAIT_S = 15.0


class _Server:
    """One server process under a guard; subclasses say how it is started and when it is ready."""

    name: str
    start_timeout_s: float
    grace_s: float

    def __init__(self, directory: str | os.PathLike, *, port: int | None = None):
        self.directory = Path(directory).absolute()
        self.port = port
        self._fixed_port = port is not None
        self._guard: subprocess.Popen | None = None

    @property
    def log_path(self) -> Path:
        """What the server printed since its last start."""
        return self.directory / "server.log"

    @property
    def running(self) -> bool:
        """Whether the server's guard lives."""
        return self._guard is not None and self._guard.poll() is None

    def kill(self) -> None:
        """End the server and its guard with SIGKILL, as a power cut would; `start` brings it back."""
        guard, self._guard = self._guard, None
        if guard is not None:
            os.killpg(guard.pid, signal.SIGKILL)
            guard.wait()

    def start(self):
        """Start the server, wait until it answers, and return self; a stopped server starts again on the same port.

        Raises:
            ConfigError: its package is not installed.
            StorageError: another server uses the directory.
            TransportError: it did not come up; the message has the end of its log.
        """
        command, environment = self._command, self._environment()
        for attempt in range(3):
            if self.port is None:
                self.port = _free_port()
            self._spawn(command(), environment)
            if self._wait_until_ready():
                return self
            tail = self._log_tail()
            self.stop()
            if self._fixed_port or attempt == 2 or "in use" not in tail:
                break
            self.port = None  # somebody took the port between the look and the bind
        raise TransportError(
            f"{self.name} did not come up on {HOST}:{self.port} within {self.start_timeout_s:g} s: "
            f"see {self.log_path}, which ends: {tail}"
        )

    def stop(self) -> None:
        """End the server with SIGTERM, wait for its data to be written, then end what is left of its group."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        guard.terminate()
        try:
            guard.wait(self.grace_s + 5)
        except subprocess.TimeoutExpired:
            os.killpg(guard.pid, signal.SIGKILL)
            guard.wait()

    def __enter__(self):
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _answers(self) -> bool:
        raise NotImplementedError

    def _spawn(self, command: list[str], environment: dict[str, str]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        guard = [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), str(self.grace_s), *command]
        with open(self.directory / "server.lock", "wb") as lock, open(self.log_path, "wb") as log:
            _lock_or_wait(lock, self.directory)
            self._guard = subprocess.Popen(
                guard,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=environment,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )

    def _wait_until_ready(self) -> bool:
        deadline = time.monotonic() + self.start_timeout_s
        try:
            while time.monotonic() < deadline and self.running:
                if self._answers():
                    return True
                time.sleep(0.02)
        except BaseException:  # Ctrl-C while waiting
            self.stop()
            raise
        return False

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-4:]) or "(empty)"


class EmbeddedBroker(_Server):
    """A Kafka broker (noida-db) on loopback; its data survives `stop` and `start` on the same directory.

    Args:
        directory: where its data, lock and log live.
        port: None takes a free one.
    """

    name = "embedded Kafka broker"
    start_timeout_s = 20.0
    grace_s = 10.0

    @property
    def bootstrap(self) -> str:
        """host:port for clients."""
        return f"{HOST}:{self.port}"

    def _command(self) -> list[str]:
        place = ["--host", HOST, "--kafka-port", str(self.port), "--data-dir", str(self.directory / "data")]
        return [str(_broker_binary()), "start", "--only", "kafka", *place]

    def _answers(self) -> bool:
        # Its own line first: without it whoever listens on this port is somebody else.
        if self.bootstrap not in self.log_path.read_text(errors="replace"):
            return False
        with contextlib.suppress(OSError):
            socket.create_connection((HOST, self.port), timeout=1).close()
            return True
        return False


class EmbeddedMlflow(_Server):
    """An MLflow server on loopback with SQLite and local artifacts, telemetry and job runners off.

    Args:
        directory: where its database, artifacts, lock and log live.
        port: None takes a free one.
    """

    name = "embedded MLflow server"
    start_timeout_s = 90.0
    grace_s = 8.0

    @property
    def uri(self) -> str:
        """The tracking and registry URI for clients."""
        return f"http://{HOST}:{self.port}"

    def _command(self) -> list[str]:
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError("mlflow is not installed: pip install -e '.[tier1]'")
        store = ["--backend-store-uri", f"sqlite:///{self.directory / 'mlflow.db'}"]
        artifacts = ["--artifacts-destination", str(self.directory / "artifacts"), "--serve-artifacts"]
        place = ["--host", HOST, "--port", str(self.port), "--workers", "1"]
        return [sys.executable, "-m", "mlflow", "server", *place, *store, *artifacts]

    def _environment(self) -> dict[str, str]:
        off = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        return {**super()._environment(), **off}

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
            return answer.status == 200
        return False


@contextlib.contextmanager
def bootstrap_servers(directory: str | os.PathLike) -> Iterator[str]:
    """Yield FEDNESTED_KAFKA_BOOTSTRAP if it is set, else the address of an embedded broker that ends with the block."""
    external = LogConfig(bootstrap="").servers()
    if external:
        yield external
        return
    with EmbeddedBroker(directory) as broker:
        yield broker.bootstrap


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _broker_binary() -> Path:
    # The package's console script only spawns this file, and killing that script would leave the broker running.
    package = importlib.util.find_spec("noida_db")
    binary = Path(package.origin).with_name("noida-db") if package else None
    if binary is None or not binary.is_file():
        raise ConfigError(
            "noida-db is not installed: pip install -e '.[demo]', or set FEDNESTED_KAFKA_BOOTSTRAP to a running broker"
        )
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)
    return binary


def _lock_or_wait(lock, directory: Path) -> None:
    """Take the directory's lock, waiting for a server of an earlier run to finish writing."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageError(f"a server already runs on {directory}: stop it, or use another directory") from None
            time.sleep(0.05)

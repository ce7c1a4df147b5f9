"""One stand-in Flyte and one connector service for all scenarios; a broker and a federation of its own for each.

`pyflyte`, the connector, the trigger and the pods are real processes; the person who approves is a real command too.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import flytekit.deck
import pytest
import yaml
from typer.testing import CliRunner

from services.approvals.commands import app as approvals
from services.embedded import EmbeddedBroker
from tasks.decks import SHOW_ALL
from tests.federation import make_workspace
from tests.flyte.stand_in.executions import Execution
from tests.flyte.stand_in.pods import WarmPods
from tests.flyte.stand_in.server import FlyteStandIn
from tests.flyte.zygote import Zygote
from tier1.federation import Federation, open_federation
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import decide, settle_candidate
from tier1.loops.records import GATE, CandidateRef

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
PATIENCE_S = 240.0
DECK_LIMIT_BYTES = 100_000
TEMPLATE = (Path(flytekit.deck.__file__).parent / "html/template.html").read_bytes()
FLYTES_OWN = tuple(TEMPLATE.count(word) for word in (b"<script", b"javascript:", b"http"))
PLACE = ["--project", "fednested", "--domain", "development"]


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    status: int
    text: str

    @property
    def words(self) -> str:
        """The text without the boxes that are drawn around errors."""
        return " ".join(self.text.replace("│", " ").split())


@dataclass(frozen=True)
class Command:
    """A process that was started, and the file that takes what it prints."""

    process: subprocess.Popen
    log: Path

    def end(self) -> Said:
        """Wait for it; one that takes too long fails the test."""
        try:
            status = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.process.args} takes too long: {self.log.read_text()[-3000:]}") from None
        return Said(status, self.log.read_text(errors="replace"))

    def wait_for(self, words: str) -> None:
        """Wait until it has said something."""
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.log.read_text(errors="replace"):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"{self.process.args} did not say {words!r}"
            time.sleep(0.05)

    def stop(self) -> None:
        """End it if it runs, and show what it said and where it was."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.process.kill()
            self.process.wait()
            print(f"{self.process.args} was still running:\n{self.log.read_text(errors='replace')[-6000:]}")


@dataclass
class Site:
    """A federation on a broker of its own, and the commands of an operator whose Flyte is the stand-in."""

    flyte: FlyteStandIn
    config: Path
    started: list[Command] = field(default_factory=list)

    @property
    def fed(self) -> Federation:
        """The federation, opened for this process."""
        return open_federation(self.config)

    def configure(self, section: str, **values: object) -> None:
        """Change keys of the configuration."""
        document = yaml.safe_load(self.config.read_text())
        document[section].update(values)
        self.config.write_text(yaml.safe_dump(document))

    @property
    def environment(self) -> dict[str, str]:
        """What the operator's shell has."""
        scratch = self.config.parent / "tmp"
        scratch.mkdir(exist_ok=True)
        ours = {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
        ours["PYTHONFAULTHANDLER"] = "1"
        return {**os.environ, **self.flyte.environment, **ours}

    def start(self, *arguments: str, **environment: str) -> Command:
        """Start a command; it ends with the scenario."""
        log = self.config.parent / f"command-{len(self.started)}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [str(SCRIPTS / arguments[0]), *arguments[1:]],
                cwd=ROOT,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.started.append(Command(process, log))
        return self.started[-1]

    def call(self, *command: str, **environment: str) -> Said:
        """Run a command to its end."""
        return self.start(*command, **environment).end()

    def launch(self, loop: str, name: str, *arguments: str) -> Command:
        """Start `pyflyte run --remote --wait --copy all` of a loop (or `module:workflow`), as the execution `name`."""
        options = ["--remote", "--wait", "--copy", "all", "--poll-interval", "1", *PLACE, "--name", name]
        module, _, workflow = loop.partition(":")
        what = [f"workflows/{module}.py", workflow or module, "--config", str(self.config), *arguments]
        return self.start("pyflyte", "run", *options, *what)

    def succeed(self, launched: Command, name: str) -> Execution:
        """Wait for a command and its execution, both of which must succeed."""
        said = launched.end()
        execution = self.flyte.wait_for_end(name)
        assert execution.phase == "SUCCEEDED", f"{execution.error.message}\n{said.text}"
        assert said.status == 0, said.text
        assert f"{name} has succeeded" in said.text
        self.check_decks(execution)
        return execution

    def check_decks(self, execution: Execution) -> None:
        """Every task that promises a deck wrote one that a person can read: small, and without a script of ours."""
        for node in execution.nodes.values():
            if node.task in self.flyte.catalog.with_decks() and node.error is None:
                place = self.flyte.root / "metadata" / execution.name / node.path / str(len(node.attempts) - 1)
                page = (place / "deck.html").read_bytes()
                assert len(page) <= DECK_LIMIT_BYTES, f"{node.task}: {len(page)} bytes"
                scripts = page.count(b"<script"), page.count(b"javascript:"), page.count(b"http")
                assert scripts == FLYTES_OWN, f"{node.task}: {scripts} of script, javascript: and http"
                assert SHOW_ALL.encode() in page, f"{node.task}: its deck is hidden until a script runs"
                self.flyte.decks.add(node.task)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait for something of the stand-in's; a launch that fails meanwhile, or too long a time, fails the test."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.flyte.wait(condition, 0.5):
            assert time.monotonic() < deadline, "nothing came of it"
            for command in self.started:
                assert command.process.poll() in (None, 0), command.log.read_text(errors="replace")[-3000:]

    def wait_for_gate(self, execution: str) -> None:
        """Wait until an execution's gate waits; one that ends before fails the test."""
        runs, gate = self.flyte.runs, (execution, GATE)
        self.wait_for(lambda: gate in self.flyte.signals or (execution in runs and runs[execution].is_over))
        assert gate in self.flyte.signals, f"{execution} {runs[execution].phase}: {runs[execution].error.message}"

    def decide(self, verdict: str, execution: str, *arguments: str) -> None:
        """Wait until the execution asks, then answer with `fednested approvals`."""
        self.wait_for_gate(execution)
        key = str(self.config.parent / "keys" / "approver.key")
        command = [verdict, "--config", str(self.config), "--execution", execution, "--key", key, *arguments]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.flyte.environment.items():
                patch.setenv(name, value)
            result = CliRunner().invoke(approvals, command)
        assert result.exit_code == 0, result.exception

    def fold_core(self, run: str = "prepared") -> CandidateRef:
        """Train here, without Flyte: a candidate that waits."""
        fed = self.fed
        with contextlib.closing(fed):
            return fold_dense(fed, train_delta(fed, pack_datasets(fed, authorise_training(fed, run)), run))

    def crown(self) -> None:
        """Make a champion, without Flyte."""
        fed, candidate = self.fed, self.fold_core()
        with contextlib.closing(fed):
            assert decide(fed, settle_candidate(fed, candidate), "approve", "console").champion == 1


@dataclass
class Connector:
    """The connector service, a real process that can be killed and started again on its port."""

    zygote: Zygote
    port: int

    def kill(self) -> None:
        """Send SIGKILL."""
        assert self.zygote.end() == -9

    def start(self) -> None:
        """Start it (again)."""
        self.zygote.start()


@pytest.fixture(scope="session")
def connector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connector]:
    port, metrics = free_port(), free_port()
    arguments = ["serve", "connector", "--port", str(port), "--prometheus_port", str(metrics)]
    arguments += ["--modules", "tasks.sensors.kafka_window"]
    with Zygote("connector", arguments, {}, tmp_path_factory.mktemp("connector") / "connector.log") as zygote:
        yield Connector(zygote, port)


@pytest.fixture(scope="session")
def flyte(
    tmp_path_factory: pytest.TempPathFactory, record_testsuite_property: Callable[[str, object], None]
) -> Iterator[FlyteStandIn]:
    root = tmp_path_factory.mktemp("flyte")
    pods = WarmPods(root / "warm.log")
    try:
        with FlyteStandIn(root, pods=pods) as flyte:
            yield flyte
            record_testsuite_property("rpcs", json.dumps(flyte.rpcs))
    finally:
        pods.close()


@pytest.fixture
def site(flyte: FlyteStandIn, tmp_path: Path) -> Iterator[Site]:
    with EmbeddedBroker(tmp_path / "broker") as broker:
        config = make_workspace(tmp_path / "federation", bootstrap=broker.bootstrap, core={"steps": 3})
        site = Site(flyte, absolute(config))
        try:
            yield site
        finally:
            for command in site.started:
                command.stop()


def absolute(config: Path) -> Path:
    """Rewrite a configuration so that it means the same places wherever a pod reads it."""
    base, document = config.parent, yaml.safe_load(config.read_text())
    document["home"] = str(base / document["home"])
    document["home_is_shared"] = True  # all pods see this machine's files
    document["identity"]["key"] = str(base / document["identity"]["key"])
    document["governance"]["policy"] = str(base / document["governance"]["policy"])
    for section, key in (("core", "datasets"), ("evaluation", "suites")):
        document[section][key] = {name: str(base / path) for name, path in document[section][key].items()}
    config.write_text(yaml.safe_dump(document))
    return config


def registration(version: str) -> list[str]:
    """Return the arguments of `pyflyte` that register every scheduled plan and what it needs."""
    return ["register", *PLACE, "--version", version, "--copy", "all", "launchplans/schedules.py"]


def free_port() -> int:
    """Return a port that the kernel gave and nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""A campaign of faults between devices and the gateway, before a real broker, with a chain at the end.

Devices make updates (random ones, as in `kills.py`), fetch the model and send everything through `chaos.Chaos`; the
gateway, the devices and the broker are processes. At the end everything is folded, and the chain must hold every number
that a device took exactly once, the log, its duplicates aside, in the order of the numbers.

    python -m benchmarks.faults [FAULTS [SEED]]
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos import Chaos, make_plan
from benchmarks.kills import SEED, make_federation
from benchmarks.kills_roles import RandomTrainer, aggregator, committer, device_config
from benchmarks.results import ROOT
from fednested_lib.client import Client
from fednested_lib.config import GatewayConfig
from fednested_lib.envelope import HEADER, parse_envelope
from fednested_lib.errors import TransportError
from fednested_lib.log import UPDATES
from fednested_lib.outbox import Outbox
from fednested_lib.transport import open_transport
from services.embedded import EmbeddedBroker
from tier1.federation import Federation, open_federation

CHUNK_BYTES = 4096
DEVICES = ("bob", "ada")  # payloads above 16 KiB by claim check, and in the record
PER_TURN = 4  # updates that a device makes in one turn
OUTAGES = 2
STUCK_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a campaign did and found; shares in percent, what came twice in chunks."""

    faults: Counter[str]
    updates: int
    exactly_once: float
    in_order: bool
    resent_chunks: float
    refetched_chunks: float
    sent_bytes: int
    partial_files: int
    duplicates: int

    @property
    def n_faults(self) -> int:
        """Faults of all kinds."""
        return sum(self.faults.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        order = "in order" if self.in_order else "NOT in order"
        return (
            f"{self.n_faults} faults ({kinds}); {self.updates} updates, {self.exactly_once:g} % exactly once, {order}, "
            f"{self.duplicates} records twice in the log; at most {self.resent_chunks:.2f} chunks sent and "
            f"{self.refetched_chunks:.2f} fetched again after a fault; {self.sent_bytes} bytes of payloads sent; "
            f"{self.partial_files} partial files left"
        )


def run_faults(
    directory: Path,
    *,
    faults: int,
    seed: int = SEED,
    outages: int = OUTAGES,
    clients: tuple[str, ...] = DEVICES,
    per_turn: int = PER_TURN,
) -> Outcome:
    """Disturb until the plan is used up, let everything end, and check.

    Raises:
        RuntimeError: a process failed or hung, or a device still holds an update.
    """
    with ExitStack() as stack:
        broker = stack.enter_context(EmbeddedBroker(directory / "broker"))
        config = make_federation(directory / "federation", broker.bootstrap)
        committer(config)  # announces genesis
        port = stack.enter_context(_gateway(config))
        devices = _Devices(config, clients)
        outage = _Outage(broker)
        stack.callback(outage.over)
        chaos = Chaos(
            port,
            plan=make_plan(faults - outages, seed),
            seed=seed,
            kill=devices.kill,
            outage=outage,
            outages=outages,
        )
        stack.callback(chaos.close)
        devices.url, deadline = chaos.url, time.monotonic() + STUCK_S
        while chaos.left:
            devices.turn(per_turn)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{chaos.left} faults are left after {STUCK_S:g} s")
        outage.over()
        aggregator(config)
        committer(config)
        devices.turn(0)  # hears what became of its updates
        return _outcome(config, devices.targets, chaos)


class _Devices:
    """Runs devices one after the other, again when one was killed."""

    def __init__(self, config: Path, clients: tuple[str, ...]):
        self.targets, self.url = dict.fromkeys(clients, 0), ""
        self._config = config
        self._process: subprocess.Popen | None = None

    def turn(self, updates: int) -> None:
        """Let every device make, and send, so many more updates."""
        for client in self.targets:
            self.targets[client] += updates
            while not self._run(client):
                pass

    def kill(self) -> None:
        """Kill the device that runs."""
        self._process.kill()

    def _run(self, client: str) -> bool:
        arguments = [str(self._config), self.url, client, str(self.targets[client])]
        command = [sys.executable, "-m", "benchmarks.faults", "device", *arguments]
        self._process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            _, problem = self._process.communicate(timeout=STUCK_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise RuntimeError(f"device {client} hung for {STUCK_S:g} s") from None
        if self._process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"device {client} ended with {self._process.returncode}: {problem[-2000:]}")
        return self._process.returncode == 0


def device(config: Path, url: str, client: str, target: int) -> None:
    """Run one device behind `url` until it has made and sent `target` updates since it was born."""
    options = device_config(config, client, max(target, 1))
    gateway = GatewayConfig(url=url, chunk_bytes=CHUNK_BYTES, timeout_s=20)
    outgoing = options.outgoing.model_copy(update={"encoding": "fp32"})
    options = options.model_copy(update={"transport": "http", "gateway": gateway, "outgoing": outgoing})
    with Outbox(options.home / "outbox", max_bytes=options.outgoing.outbox_bytes) as outbox:
        while True:
            one = Client(options, open_transport(options), outbox, lambda: False)
            one.trainer.local = RandomTrainer(options, one.trainer.spool)
            try:
                report = one.run()
            except TransportError:
                continue  # nothing to do without a model: the supervisor starts it again
            if report.waiting == 0:
                return


class _gateway:
    """The gateway as a process on a free port; entering gives the port."""

    def __init__(self, config: Path):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        limits = ["--requests-per-s", "10000", "--burst", "10000", "--min-poll-s", "0"]
        self._command = [sys.executable, "-m", "services.gateway", "--config", str(config), "--port", str(self._port)]
        self._command += limits

    def __enter__(self) -> int:
        self._process = subprocess.Popen(self._command, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return self._port
            except OSError:
                time.sleep(0.05)
        self.__exit__()
        raise RuntimeError("the gateway did not start")

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Outage:
    """Kills the broker and brings it back while a record is on its way to it."""

    def __init__(self, broker: EmbeddedBroker):
        self._broker, self._timer = broker, threading.Timer(0, lambda: None)

    def __call__(self) -> None:
        self.over()
        time.sleep(2.0)  # it writes once a second; what a kill loses is `kills.py`'s and `test_log_loss.py`'s matter
        self._broker.kill()
        self._timer = threading.Timer(0.5, self._broker.start)
        self._timer.start()

    def over(self) -> None:
        """Wait until the broker is back."""
        if self._timer.is_alive():
            self._timer.join(60)


def _outcome(config: Path, targets: dict[str, int], chaos: Chaos) -> Outcome:
    fed = open_federation(config)
    try:
        made = {(client, 0, sequence) for client, target in targets.items() for sequence in range(target)}
        found, refused = _folded(fed)
        order, duplicates = _order(fed)
        faults = Counter({kind: count for kind, count in chaos.done.items() if kind != "POST"})
        homes = [device_config(config, client, 1).home for client in targets]
        partial = [
            *(fed.home / "gateway/uploads").rglob("*.part"),
            *(p for h in homes for p in h.glob("sidecar/partials/*")),
        ]
        for home in homes:
            _require_settled(home)
        if refused:
            raise RuntimeError(f"the chain refused {refused}")
        return Outcome(
            faults=faults,
            updates=len(made),
            exactly_once=100 * sum(found[claim] == 1 for claim in made) / len(made | set(found)),
            in_order=all(numbers == sorted(numbers) for numbers in order.values()),
            resent_chunks=max(chaos.again["PATCH"]) / CHUNK_BYTES,
            refetched_chunks=max(chaos.again["BLOB"]) / CHUNK_BYTES,
            sent_bytes=chaos.sent_bytes,
            partial_files=len(partial),
            duplicates=duplicates,
        )
    finally:
        fed.close()


def _folded(fed: Federation) -> tuple[Counter, Counter]:
    """Return how often each (client, key epoch, number) was accepted, and what else than duplicates was refused."""
    folds = [sealed.entry.body.candidate for sealed in fed.chain.entries() if hasattr(sealed.entry.body, "candidate")]
    accepted = Counter((row.client_id, row.key_epoch, row.sequence) for fold in folds for row in fold.accepted)
    refused = Counter(row.reason for fold in folds for row in fold.refused if row.reason != "duplicate")
    return accepted, refused


def _order(fed: Federation) -> tuple[dict[str, list[int]], int]:
    """Return the numbers of each client as they stand in the log, each once, and how many records came twice."""
    order: dict[str, dict[int, None]] = {}
    records = 0
    for record in fed.log.read(UPDATES, fed.log.watermarks(UPDATES)):
        envelope = parse_envelope(dict(record.headers)[HEADER])
        order.setdefault(envelope.client_id, {}).setdefault(envelope.sequence)
        records += 1
    return {client: list(numbers) for client, numbers in order.items()}, records - sum(map(len, order.values()))


def _require_settled(home: Path) -> None:
    with Outbox(home / "outbox", max_bytes=1 << 30) as outbox:
        left = [*outbox.pending(), *outbox.unconfirmed(), *outbox.dead()]
    if left:
        raise RuntimeError(f"device {home.name} holds {len(left)} updates, {left[0].sequence}: {left[0].last_error}")


def main(faults: int = 84, seed: int = SEED) -> None:
    """Run a campaign and print it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        print(run_faults(Path(directory), faults=faults, seed=seed))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["device"]:
        import logging

        import structlog

        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        device(Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main(*map(int, sys.argv[1:]))

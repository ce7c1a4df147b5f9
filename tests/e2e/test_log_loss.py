"""A broker that comes back without its end, with other records at the same offsets, or as another cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.kills import make_federation
from benchmarks.kills_roles import aggregator, committer, device, device_config
from fednested_lib.blobs import BlobStore
from fednested_lib.errors import LogError
from fednested_lib.log import UPDATES, KafkaLog
from fednested_lib.outbox import Outbox
from services.embedded import EmbeddedBroker
from tier1.federation import open_federation
from tier1.loops.accept_log import accept_log
from tier1.loops.replay import verify_all
from tier1.versions.new_log import lost_ranges
from tier1.versions.replay import replay

CLIENTS = ("ada", "bob")
PER_TURN = 2


@dataclass
class World:
    """A federation on a broker whose data directory can be put back to an earlier state."""

    broker: EmbeddedBroker
    config: Path
    made: Counter

    def send(self, *clients: str, n: int = PER_TURN) -> None:
        """Let devices make n updates more, and hear and send what there is."""
        for client in clients:
            self.made[client] += n
            device(self.config, self.broker.bootstrap, client, self.made[client])

    def turn(self) -> None:
        """Cut, fold, settle, tell, announce."""
        aggregator(self.config)
        committer(self.config)

    def keep(self) -> None:
        """Copy the broker's data as it is now."""
        self.broker.stop()
        shutil.copytree(self.broker.directory / "data", self.broker.directory / "kept")
        self.broker.start()

    def lose(self, *, everything: bool = False) -> None:
        """Put the broker back to the copy, or to nothing."""
        self.broker.stop()
        shutil.rmtree(self.broker.directory / "data")
        if not everything:
            shutil.copytree(self.broker.directory / "kept", self.broker.directory / "data")
        self.broker.start()

    def append(self, key: str, n: int) -> None:
        """Put records of no use into the partition of a device."""
        log = KafkaLog(self.broker.bootstrap)
        for number in range(n):
            log.append(UPDATES, key=key.encode(), value=b"other %d" % number, headers={})
        log.close()

    def state(self):
        """Read the chain."""
        return open_federation(self.config).chain.state()

    def left(self, client: str) -> list:
        """Return what a device still keeps for the day that nobody settles it."""
        with Outbox(device_config(self.config, client, 1).home / "outbox", max_bytes=1 << 30) as outbox:
            return [*outbox.pending(), *outbox.unconfirmed(), *outbox.dead()]


@pytest.fixture
def world(tmp_path):
    """Two updates of each device in version 1, then a copy; two in version 2, which only ada hears; two more of ada."""
    with EmbeddedBroker(tmp_path / "broker") as broker:
        world = World(broker, make_federation(tmp_path / "federation", broker.bootstrap), Counter())
        committer(world.config)
        world.send(*CLIENTS)
        world.turn()
        world.keep()
        world.send(*CLIENTS)
        world.turn()
        world.send("ada")
        yield world


def stopped(world: World, match: str) -> None:
    """The stop is named, and nothing is folded."""
    before = world.state().digest
    candidates = sorted((world.config.parent / "home/candidates").iterdir())
    with pytest.raises(LogError, match=match):
        aggregator(world.config)
    assert world.state().digest == before
    assert sorted((world.config.parent / "home/candidates").iterdir()) == candidates


def heal(world: World) -> Counter:
    """Devices hear that a log was accepted and send again; return why records were refused since."""
    before = world.state().seq
    for _ in range(2):
        world.send(*world.made, n=0)
        world.turn()
    world.send(*world.made, n=0)
    entries = open_federation(world.config).chain.entries()[before + 1 :]
    folds = [sealed.entry.body.candidate for sealed in entries if hasattr(sealed.entry.body, "candidate")]
    return Counter(row.reason for fold in folds for row in fold.refused)


def check(world: World, tmp_path: Path, *, given_up: int) -> None:
    """Every sequence number exactly once, every receipt received, every version rebuilt from the archive alone."""
    fed = open_federation(world.config)
    folds = [sealed.entry.body.candidate for sealed in fed.chain.entries() if hasattr(sealed.entry.body, "candidate")]
    found = Counter((row.client_id, row.sequence) for fold in folds for row in fold.accepted)
    assert found == Counter((client, sequence) for client, n in world.made.items() for sequence in range(n))
    assert not [world.left(client) for client in world.made if world.left(client)]
    target = BlobStore(tmp_path / "replayed")
    results = list(replay(fed.chain, archive=fed.archive, genesis=fed.blobs, target=target))
    assert {result.verdict for result in results} == {"identical"}
    assert any(f"{given_up} of a log that was given up" in line for line in verify_all(fed))
    fed.close()


def command(world: World, *arguments: str, failpoint: str = "") -> subprocess.CompletedProcess:
    return process("fednested_lib.cli", "tier1", *arguments, "--config", str(world.config), failpoint=failpoint)


def process(module: str, *arguments: str, failpoint: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "FEDNESTED_FAILPOINT": failpoint},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_lost_end_is_a_named_stop_and_heals_by_resends(world, tmp_path):
    """Consumed and unconsumed records are gone: stop; accepted, what the chain has is refused, the rest folded."""
    world.lose()
    stopped(world, "watermarks went backwards.*accept-log")
    accepted = accept_log(open_federation(world.config), "restored from last night's backup")
    assert sum(end - start for start, end in lost_ranges(accepted).values()) == 2 * PER_TURN
    assert heal(world) == {"duplicate": PER_TURN}  # of bob, whose receipts were on the end that is lost
    check(world, tmp_path, given_up=1)


def test_reused_offsets_are_a_named_stop_and_heal_by_resends(world, tmp_path):
    """Other records lie where consumed ones lay: none is folded by mistake, and those that are good get in."""
    world.lose()
    world.send("cat")
    for client in ("cat", *CLIENTS):
        world.append(client, 2 * PER_TURN)
    stopped(world, "re-used offsets.*accept-log")
    accept_log(open_federation(world.config), "the broker's disk was put back")
    # bob's receipts were lost; cat's updates are on this log and are sent again before they are consumed
    assert heal(world) == {"duplicate": 2 * PER_TURN, "bad_envelope": 3 * 2 * PER_TURN}
    check(world, tmp_path, given_up=1)


def test_another_cluster_is_a_named_stop_and_heals_by_resends(world, tmp_path):
    """Everything on the broker is gone, control topic included; one command goes on, and devices follow."""
    world.lose(everything=True)
    stopped(world, "this one is .*accept-log")
    stop = command(world, "verify")
    assert stop.returncode == LogError.exit_code
    assert len(stop.stderr.strip().splitlines()) == 1
    assert "accept-log" in stop.stderr
    done = command(world, "accept-log", "--reason", "the cluster burnt down")
    assert done.returncode == 0, done.stderr
    assert "log generation 1" in done.stdout
    assert "the cluster burnt down" in command(world, "status").stdout
    assert heal(world) == {"duplicate": PER_TURN}
    check(world, tmp_path, given_up=2)


def test_a_resend_survives_kills_of_who_asks_and_who_answers(world, tmp_path):
    """Killed when it had asked, tier 1 asks again; killed when it had queued, a device queues again; all once."""
    world.lose()
    killed = command(world, "accept-log", "--reason", "a power cut", failpoint="resend.after_publish")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    world.turn()  # the committer repairs the view
    bootstrap, made = world.broker.bootstrap, str(world.made["bob"])
    arguments = ("device", str(world.config), bootstrap, "bob", made)
    killed = process("benchmarks.kills_roles", *arguments, failpoint="sidecar.after_send_again")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert heal(world) == {"duplicate": PER_TURN}
    check(world, tmp_path, given_up=1)

"""A campaign of SIGKILLs over the two processes of real devices, a broker that loses its last second included.

Two devices train a small MoE on text of their own (`small_federation`), each as a sidecar and a trainer; the one sends
its payloads in the record, the other by claim check. Both processes of both run all the time, each until it dies at a
named failpoint, and are started again. Tier 1 folds, gates and publishes what arrives. Halfway the broker is killed and
brought back as it was a while before; the chain has consumed what is lost, so tier 1 accepts the log and asks again.

At the end every number that a device took must be in the chain exactly once, each device's in order, and every update
must be the very one, by its content-derived id, that a device which nobody killed makes of the same base and number.

    python -m benchmarks.device_kills [KILLS [SEED]]
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from benchmarks.device_kills_roles import start
from benchmarks.device_world import ProcessFederation
from fednested_lib.client import Client
from fednested_lib.config import load_tier2
from fednested_lib.errors import LogError, TransportError
from fednested_lib.events import ModelAvailable, sign_event
from fednested_lib.log import CONTROL, TOPICS, InMemoryLog
from fednested_lib.outbox import Outbox
from fednested_lib.trainer_loop import TrainerState
from services.embedded import EmbeddedBroker
from tier1.federation import Federation
from tier1.loops.accept_log import accept_log
from tier1.loops.views import publish_outcomes

SEED = 20261122
PATIENCE_S = 120.0
FOLD_EVERY_S = 1.5
FAILPOINTS = {
    "sidecar": (
        *("sidecar.after_fetch", "sidecar.after_orders", "sidecar.after_release", "sidecar.after_send"),
        *("outbox.after_file", "outbox.after_row", "outbox.after_blob", "outbox.after_append", "outbox.after_mark"),
        *("outbox.after_confirm", "sidecar.after_charge", "sidecar.after_audit", "durable.before_rename"),
    ),
    "trainer": (
        *("trainer.after_job", "trainer.after_training", "trainer.after_spool", "trainer.after_status"),
        *("trainer.after_removal", "durable.before_rename"),
    ),
}
ONE_UPDATE = ("sidecar.after_charge", "sidecar.after_audit")
CLAIM_CHECKED = "device-01"  # whose payloads are above 16 KiB
Claim = tuple[str, int]  # client, sequence number


@dataclass(kw_only=True)
class Found:
    """What a campaign found; shares in percent."""

    seed: int
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    updates: int = 0
    exactly_once: float = 0.0
    in_order: float = 0.0
    same_bytes: float = 0.0
    lost_records: int = 0
    resent: int = 0

    @property
    def missed(self) -> list[str]:
        """Failpoints at which no process died."""
        return [f"{role} {name}" for role, names in FAILPOINTS.items() for name in names if not self.kills[role, name]]

    def __str__(self) -> str:
        hits = ", ".join(f"{role} {name} {n}" for (role, name), n in sorted(self.kills.items()))
        return (
            f"seed {self.seed}: {self.kills.total()} kills ({hits}); none at: {', '.join(self.missed) or '-'}\n"
            f"{self.updates} updates: {self.exactly_once:g} % exactly once, {self.in_order:g} % in order, "
            f"{self.same_bytes:g} % the bytes of an unkilled device; the broker lost {self.lost_records} records, "
            f"{self.resent} records were duplicates"
        )


class Slot:
    """One process of one device, started again whenever it dies."""

    def __init__(self, role: str, path: Path):
        self.role, self.path = role, path
        self.failpoint = ""
        self.process: multiprocessing.Process | None = None

    def start(self, failpoint: str) -> None:
        """Start it, to die at the failpoint."""
        self.failpoint = failpoint
        self.process = start(self.role, self.path, failpoint)

    def died(self) -> bool:
        """Tell whether it was killed where it should be.

        Raises:
            RuntimeError: it ended otherwise.
        """
        if self.process.is_alive():
            return False
        if self.process.exitcode not in (
            -signal.SIGKILL,
            128 + signal.SIGKILL,
        ):  # itself, or its process for one update
            raise RuntimeError(f"{self.role} of {self.path.parent.name} ended with {self.process.exitcode}")
        return True

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.join(PATIENCE_S)


class Campaign:
    """Runs devices, kills, folds.

    Args:
        directory: empty.
        broker: running.
        kills: how many.
        seed: chooses the order of failpoints.
    """

    def __init__(self, directory: Path, broker: EmbeddedBroker, *, kills: int, seed: int):
        self.broker, self.kills, self.found = broker, kills, Found(seed=seed)
        self.world = ProcessFederation(
            directory,
            broker.bootstrap,
            n_devices=2,
            ranks={CLAIM_CHECKED: 16},
            training={"updates_per_base": 1000},
        )
        self.slots = [Slot(role, path) for path in self.world.devices for role in FAILPOINTS]
        self._rng = random.Random(seed)
        self._next_fold = 0.0

    @property
    def fed(self) -> Federation:
        """Tier 1."""
        return self.world.tier1

    def run(self) -> Found:
        """Kill until it is enough, then let everything end, and check."""
        for slot in self.slots:
            slot.start(self._aim(slot))
        try:
            self._until(lambda: self.found.kills.total() >= self.kills // 2)
            self._lose_the_end()
            self._until(lambda: self.found.kills.total() >= self.kills)
            self._settle()
        finally:
            for slot in self.slots:
                slot.process.kill()
        self._check()
        return self.found

    def _aim(self, aiming: Slot) -> str:
        """Choose a failpoint that was hit or is aimed at least."""
        role = aiming.role
        aimed = Counter(slot.failpoint.partition(":")[0] for slot in self.slots if slot.role == role and slot.process)
        inline = aiming.path.parent.name != CLAIM_CHECKED
        names = [each for each in FAILPOINTS[role] if not (inline and each == "outbox.after_blob")]
        name = min(names, key=lambda each: (self.found.kills[role, each] + aimed[each], self._rng.random()))
        # What a process for one update passes, it passes once.
        return f"{name}:{1 if name in ONE_UPDATE else self._rng.randint(1, 2)}"

    def _until(self, enough, *, killing: bool = True) -> None:
        """Start again what dies, and fold now and then."""
        deadline = time.monotonic() + PATIENCE_S
        before = self.found.kills.total()
        while not enough():
            for slot in self.slots:
                if slot.died():
                    self.found.kills[slot.role, slot.failpoint.partition(":")[0]] += 1
                    slot.start(self._aim(slot) if killing else "")
            if self.found.kills.total() > before:
                before, deadline = self.found.kills.total(), time.monotonic() + PATIENCE_S
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing happened for {PATIENCE_S:g} s: {[slot.failpoint for slot in self.slots]}")
            if time.monotonic() > self._next_fold:
                self.fold()
            time.sleep(0.01)

    def fold(self) -> None:
        """Let tier 1 turn once, if it can reach its log."""
        with contextlib.suppress(TransportError):
            if any(high > low for low, high in self._unread()):
                self.world.fold()
            publish_outcomes(self.fed)
        self._next_fold = time.monotonic() + FOLD_EVERY_S

    def _unread(self) -> list[tuple[int, int]]:
        state = self.fed.chain.state()
        marks = self.fed.log.watermarks("updates.experts.local")
        return [(int(state.offsets[str(partition)]), high) for partition, (_, high) in marks.items()]

    def _lose_the_end(self) -> None:
        """Kill the broker after tier 1 has consumed more than what it comes back with; accept the log."""
        kept = self.broker.directory / "kept"
        self.broker.stop()
        shutil.copytree(self.broker.directory / "data", kept)
        self.broker.start()
        consumed = sum(self.fed.chain.state().offsets.values())
        self._until(lambda: sum(self.fed.chain.state().offsets.values()) >= consumed + 4)
        # Else a sidecar may have sent the same records to the same offsets before tier 1 looks: nothing would be lost.
        self._signal_sidecars(signal.SIGSTOP)
        os.killpg(self.broker._guard.pid, signal.SIGKILL)  # the guard and the broker in one blow
        self.broker._guard.wait()
        shutil.rmtree(self.broker.directory / "data")
        shutil.copytree(kept, self.broker.directory / "data")
        self.broker.start()
        self.world.reopen()
        before = sum(self.fed.chain.state().offsets.values())
        marks = self.fed.log.watermarks("updates.experts.local")
        self.found.lost_records = before - sum(high for _, high in marks.values())
        try:
            self.world.fold()
        except LogError:
            accept_log(self.fed, "the broker was killed and lost its end")
        else:
            raise RuntimeError("tier 1 did not notice that the log lost its end")
        finally:
            self._signal_sidecars(signal.SIGCONT)

    def _signal_sidecars(self, number: int) -> None:
        for slot in self.slots:
            if slot.role == "sidecar" and slot.process.is_alive():
                os.kill(slot.process.pid, number)

    def _settle(self) -> None:
        """Stop the trainers, and fold until no sidecar holds anything that nobody named."""
        for slot in self.slots:
            slot.process.kill()
            slot.process.join()
            if slot.role == "sidecar":
                slot.start("")
        trainers, self.slots = ([slot for slot in self.slots if slot.role == role] for role in ("trainer", "sidecar"))
        deadline = time.monotonic() + PATIENCE_S
        while any(_left(slot.path) for slot in self.slots):
            if time.monotonic() > deadline:
                raise RuntimeError("a device still holds updates that nobody named")
            self.fold()
            time.sleep(0.2)
        for slot in self.slots:
            slot.stop()
        self.slots += trainers

    def _check(self) -> None:
        rows = list(self._accepted())
        made = {(path.parent.name, number) for path in self.world.devices for number in range(_made(path))}
        times = Counter(claim for claim, _, _, _ in rows)
        self.found.updates = len(made)
        self.found.exactly_once = 100 * sum(times[claim] == 1 for claim in made) / len(made | set(times))
        pairs = ordered = 0
        for client in {client for client, _ in made}:
            numbers = [(seq, claim[1]) for claim, seq, _, _ in rows if claim[0] == client]
            for (seq, one), (later, other) in zip(numbers, numbers[1:], strict=False):
                pairs, ordered = pairs + 1, ordered + (one < other or seq == later)
        self.found.in_order = 100 * ordered / pairs
        calm = {claim: self._calm_id(claim, version) for claim, _, version, _ in rows}
        self.found.same_bytes = 100 * sum(calm[claim] == update_id for claim, _, _, update_id in rows) / len(rows)

    def _accepted(self):
        """Yield (claim, position in the chain, base version, update id) of what was folded, in order."""
        for sealed in self.fed.chain.entries():
            candidate = getattr(sealed.entry.body, "candidate", None)
            for row in candidate.accepted if candidate is not None else ():
                yield (row.client_id, row.sequence), sealed.entry.seq, row.base_version, row.update_id
            self.found.resent += sum(row.reason == "duplicate" for row in candidate.refused) if candidate else 0

    def _calm_id(self, claim: Claim, version: int) -> str:
        """Return the id of the update that an unkilled device makes of the same base, rows and number."""
        client, sequence = claim
        config = load_tier2(self.world.directory / client / "tier2.yaml")
        how = config.training
        with tempfile.TemporaryDirectory() as home:
            config = config.model_copy(update={"home": Path(home)})
            (Path(home) / "blobs").symlink_to(self.fed.home / "blobs")
            log = InMemoryLog(name=f"calm {client} {sequence}")
            log.create_topics(TOPICS)
            self._announce(log, version)
            with Outbox(config.home / "outbox", max_bytes=1 << 30) as outbox:
                device = Client(config, log, outbox, lambda: False)
                first_row = sequence * how.steps * how.batch_size
                device.trainer.state = TrainerState(next_sequence=sequence, next_row=first_row)
                device.follow()
                device.start_job()
                device.finish_job()
                (item,) = outbox.pending()
                return item.update_id

    def _announce(self, log: InMemoryLog, version: int) -> None:
        view = self.fed.chain.state().versions[version]
        event = ModelAvailable(
            federation=self.fed.config.federation,
            version=version,
            snapshot=self.fed.blobs.put(view.snapshot.to_json()),
            base_digest=view.base_digest,
            chain_seq=1,
            chain_head="0" * 64,
        )
        log.append(CONTROL, key=b"champion", value=event.to_bytes(), headers=sign_event(event, self.fed.signer))


def _left(path: Path) -> int:
    """Count what a device keeps for the day that nobody settles it, without disturbing its owner."""
    import sqlite3

    database = load_tier2(path).home / "outbox/outbox.db"
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
        return opened.execute("SELECT count(*) FROM updates WHERE state != 'confirmed'").fetchone()[0]


def _made(path: Path) -> int:
    with Outbox(load_tier2(path).home / "outbox", max_bytes=1 << 30) as outbox:
        return outbox.last_sequence() + 1


def run_campaign(directory: Path, *, kills: int, seed: int = SEED) -> Found:
    """Run one campaign in an empty directory."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    (directory / "federation").mkdir()
    with EmbeddedBroker(directory / "broker") as broker:
        return Campaign(directory / "federation", broker, kills=kills, seed=seed).run()


def main(kills: int = 100, seed: int = SEED) -> None:
    """Run a campaign and print it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        print(run_campaign(Path(directory), kills=kills, seed=seed))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

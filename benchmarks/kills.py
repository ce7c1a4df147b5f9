"""A campaign of SIGKILLs over device, aggregator and committer of one federation on a real broker.

Every piece of work (six devices that send, one cut folded, one candidate settled and announced, in turn) is killed
twice, at a named failpoint and at a random time, and then run to its end. A kill counts if the process died of it
between its first durable step and the end of its piece, which its trace of failpoints shows. Recovery is the time from
starting a process, interpreter and imports included, until the interrupted piece is done.

Training, evaluation and approval are stand-ins (`kills_roles.py`): heads are approved past policy, promotion checklist
and registry, so the failpoints there are not in reach. `ELSEWHERE` names those and the tests that kill at them.

At the end the chain must hold every sequence number that a device ever took exactly once, no device may still hold an
unsettled update, and replay from genesis must give every digest.

    python -m benchmarks.kills [KILLS [UPDATES [SEED]]]
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.kills_roles import CLIENTS, device_config
from benchmarks.results import ROOT
from fednested_lib.blobs import BlobStore
from fednested_lib.log import UPDATES, KafkaLog
from fednested_lib.outbox import Outbox
from fednested_lib.snapshot import SLICE_TENSOR, SnapshotManifest, encode_blob, expert_shapes, slice_key
from services.embedded import EmbeddedBroker
from tests.policies import pin_policy
from tier1.federation import Federation, open_federation
from tier1.versions.commit import utc_now
from tier1.versions.manifest import Genesis, NumericProfile
from tier1.versions.replay import replay, verify_log
from tier1.workspace import create_workspace, load_or_create_key

SEED = 20261122
PER_PIECE = 5  # updates that a device makes in one piece
STUCK_S = 120.0
RANDOM, DONE = "random", "done"
FAILPOINTS = {
    "device": (
        *("outbox.after_file", "outbox.after_row", "outbox.after_blob", "outbox.after_append", "outbox.after_mark"),
        *("outbox.after_confirm", "sidecar.after_fetch", "sidecar.after_orders", "sidecar.after_release"),
        *("sidecar.after_send", "trainer.after_job", "trainer.after_status", "trainer.after_training"),
        *("trainer.after_spool", "trainer.after_removal", "durable.before_rename"),
        *("sidecar.after_charge", "sidecar.after_audit", "audit.after_line", "audit.after_key"),
    ),
    "aggregator": (
        *("journal.before_sync", "durable.before_rename", "fold.after_archive", "fold.after_blobs"),
        "fold.after_candidate",
    ),
    "committer": (
        *("commit.before_append", "commit.after_append", "quarantine.after_publish", "settled.after_publish"),
        *("durable.before_rename", "journal.before_sync", "fold.after_candidate", "broadcast.before_event"),
    ),
}
# Failpoints that no role of the campaign passes: why, and who kills there.
ELSEWHERE = {
    "sidecar.after_roll_back": "every snapshot loads here: tests/fednested_lib/test_client.py",
    "sidecar.after_send_again": "no log is lost here: tests/e2e/test_log_loss.py",
    "gateway.after_chunk": "devices speak to the broker: tests/services/test_gateway.py",
    "gateway.after_range": "devices speak to the broker: tests/services/test_gateway.py",
    "resend.after_publish": "no log is lost here: tests/e2e/test_log_loss.py",
    "decide.after_append": "heads are approved past `decide`: tests/e2e/tier1_process.py",
    "registry.after_register": "no registry is kept: tests/e2e/tier1_process.py",
    "core.after_training": "no core is trained: tests/e2e/tier1_process.py",
    "core.after_publish": "no core is trained: tests/e2e/tier1_process.py",
    "core.after_step": "no core is trained: tests/tier1/training/test_ranks.py",
    "checkpoint.before_rename": "no core is trained: tests/tier1/training/test_ranks.py",
    "data_engine.after_decision": "no data engine turns: tests/tier1/loops/test_data_engine.py",
    "data_engine.after_request": "no data engine turns: tests/tier1/loops/test_data_engine.py",
}
MODEL = {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
}


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill that counts: whom, how it was aimed, and the last failpoint that the process had passed."""

    role: str
    aim: str
    after: str


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One process: the failpoints that it passed, and after how long it was done; None: killed."""

    trace: list[str]
    done_s: float | None


@dataclass(kw_only=True)
class Campaign:
    """What a campaign did and found; recoveries in seconds, shares in percent."""

    seed: int
    kills: list[Kill] = field(default_factory=list)
    recoveries: dict[str, list[float]] = field(default_factory=lambda: {role: [] for role in FAILPOINTS})
    updates: int = 0
    exactly_once: float = 0.0
    replayed: float = 0.0
    versions: int = 0
    duplicates: int = 0

    def killed_at(self, role: str, name: str) -> int:
        """Return how often a process of `role` died at the failpoint `name`."""
        return sum(kill.role == role and kill.aim.partition(":")[0] == name for kill in self.kills)

    @property
    def missed(self) -> list[str]:
        """Named failpoints at which no process died."""
        return [
            f"{role} {name}" for role, names in FAILPOINTS.items() for name in names if not self.killed_at(role, name)
        ]

    def __str__(self) -> str:
        kills = Counter((kill.role, "random" if kill.aim == RANDOM else "named") for kill in self.kills)
        lines = [
            f"seed {self.seed}: {len(self.kills)} kills; failpoints that none hit: {', '.join(self.missed) or 'none'}",
            *(f"  {role}: {count} {aim}" for (role, aim), count in sorted(kills.items())),
            *(
                f"  {role}: recovery median {median(times):.2f} s, largest {max(times):.2f} s, {len(times)} times"
                for role, times in self.recoveries.items()
                if times
            ),
            f"{self.updates} updates in {self.versions} versions, {self.duplicates} duplicates refused: "
            f"{self.exactly_once:g} % exactly once, {self.replayed:g} % of versions replayed to their digests",
        ]
        return "\n".join(lines)


def run_campaign(directory: Path, *, kills: int, updates: int, seed: int = SEED) -> Campaign:
    """Kill until both numbers are reached, let everything end, and check.

    Args:
        directory: empty, for broker and federation.
        kills: least number of kills that count.
        updates: least number of updates.
        seed: chooses failpoints and random times.

    Raises:
        RuntimeError: a process failed or hung, or a device holds an update that nothing settled.
        LogError: a record of the log is not the one that the chain names.
    """
    with EmbeddedBroker(directory / "broker") as broker:
        driver = _Driver(make_federation(directory / "federation", broker.bootstrap), broker.bootstrap, seed)
        driver.work("committer")  # announces genesis
        while len(driver.campaign.kills) < kills or sum(driver.targets.values()) < updates:
            driver.round()
        driver.end()
        _check(driver)
    return driver.campaign


def make_federation(directory: Path, bootstrap: str) -> Path:
    """Write workspace, device keys and a genesis of random weights; return the configuration's path."""
    devices = directory / "devices"
    keys = {name: load_or_create_key(devices / f"{name}.key").public_key for name in CLIENTS}
    pin_policy(devices, min_tokens_per_rank=1, updates_per_day=1_000_000)
    (devices / "text.jsonl").write_text('{"text": "nobody trains on this"}\n')
    config = create_workspace(
        directory,
        datasets={},
        suites={},
        devices=keys,
        overrides={
            "log": {"bootstrap": bootstrap},
            "window": {"min_updates": 1, "max_wait_s": 0.0},
            "aggregation": {"probe": None},  # updates are random, and there is no text to judge them by
        },
    )
    fed = open_federation(config)
    fed.chain.append(_genesis(fed), 0)
    fed.close()
    return config


def _genesis(fed: Federation) -> Genesis:
    rng, blobs = np.random.default_rng(0), {}
    shapes = expert_shapes(SnapshotManifest(version=0, family="mixtral", model_config=MODEL, tokenizer="", blobs={}))
    for param, (n, d_out, d_in) in shapes.items():
        for expert in range(n):
            weight = rng.standard_normal((d_out, d_in)).astype(np.float32)
            blobs[slice_key(param, expert)] = fed.blobs.put(encode_blob({SLICE_TENSOR: weight}))
    return Genesis(
        federation=fed.config.federation,
        family="mixtral",
        model=MODEL,
        tokenizer=fed.blobs.put(b"{}"),
        blobs=blobs,
        profile=NumericProfile(torch="none", instruction_set="none"),
        trainer=fed.config.identity.principal,
        offsets={str(partition): high for partition, (_, high) in fed.log.watermarks(UPDATES).items()},
        created_at=utc_now(),
    )


class _Driver:
    """Starts pieces of work, kills them, and keeps count."""

    def __init__(self, config: Path, bootstrap: str, seed: int):
        self.config, self.bootstrap = config, bootstrap
        self.campaign = Campaign(seed=seed)
        self.targets = dict.fromkeys(CLIENTS, 0)
        self._rng = random.Random(seed)
        self._turn = itertools.cycle(CLIENTS)
        self._passed: dict[str, Counter[str]] = {role: Counter() for role in FAILPOINTS}
        self._length_s = dict.fromkeys(FAILPOINTS, 0.3)

    def round(self) -> None:
        """Three devices send, something unreadable arrives, and tier 1 turns once; all are killed on the way."""
        for client in itertools.islice(self._turn, 3):
            self.targets[client] += PER_PIECE
            self._send(client, disturbed=True)
        self._send_garbage()
        for role in ("aggregator", "committer"):
            self.work(role, disturbed=True)

    def end(self) -> None:
        """Fold what is left, and let every device hear what became of its updates."""
        for role in ("aggregator", "committer"):
            self.work(role)
        for client, target in self.targets.items():
            if target:
                self._send(client)

    def work(self, role: str, *arguments: str, disturbed: bool = False) -> None:
        """Do one piece of work; disturbed: kill it at a failpoint, its restart at a random time, then let it be."""
        killed = False
        for aim in (self._aim(role), RANDOM, "") if disturbed else ("",):
            run = self._run(role, arguments, aim)
            if run.done_s is None:
                self.campaign.kills.append(Kill(role=role, aim=aim, after=run.trace[-1]))
                killed = True
                continue
            if killed:
                self.campaign.recoveries[role].append(run.done_s)
            return

    def _send(self, client: str, *, disturbed: bool = False) -> None:
        self.work("device", self.bootstrap, client, str(self.targets[client]), disturbed=disturbed)

    def _send_garbage(self) -> None:
        log = KafkaLog(self.bootstrap)
        log.append(UPDATES, key=b"mallory", value=b"garbage", headers={})
        log.close()

    def _aim(self, role: str) -> str:
        """Choose a failpoint that was hit least, and one of the times that this role passes it."""
        name = min(FAILPOINTS[role], key=lambda each: (self.campaign.killed_at(role, each), self._rng.random()))
        return f"{name}:{self._rng.randint(1, max(1, self._passed[role][name]))}"

    def _run(self, role: str, arguments: tuple[str, ...], aim: str) -> _Run:
        """Start one process, kill it as aimed, and return what it did until it was done or dead."""
        environment = {**os.environ, "FEDNESTED_FAILPOINT_TRACE": "/dev/stdout", "OMP_NUM_THREADS": "1"}
        environment |= {"FEDNESTED_FAILPOINT": "" if aim == RANDOM else aim, "FEDNESTED_KAFKA_BOOTSTRAP": ""}
        command = [sys.executable, "-m", "benchmarks.kills_roles", role, str(self.config), *arguments]
        began, delay_s = time.monotonic(), self._rng.uniform(0, self._length_s[role])
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        stuck = threading.Event()

        def give_up() -> None:
            stuck.set()
            process.kill()

        timers = [threading.Timer(STUCK_S, give_up), threading.Timer(delay_s, process.kill)]
        timers[0].start()
        trace: list[str] = []
        times: list[float] = []
        for line in process.stdout:
            trace.append(line.strip())
            times.append(time.monotonic() - began)
            if aim == RANDOM and len(trace) == 1:
                timers[1].start()
        code, problem = process.wait(), process.stderr.read()
        process.stderr.close(), process.stdout.close()
        for timer in timers:
            timer.cancel()
        if stuck.is_set():
            raise RuntimeError(f"{role} hung for {STUCK_S:g} s after {trace[-1:]} (aim {aim!r}): {problem[-2000:]}")
        if trace[-1:] == [DONE]:
            self._passed[role] |= Counter(trace)
            self._length_s[role] = max(times[-1] - times[0], 0.01)
            return _Run(trace=trace, done_s=times[-1])
        if code != -signal.SIGKILL or not aim or not trace:
            raise RuntimeError(f"{role} ended with {code} after {trace[-1:]} (aim {aim!r}): {problem[-2000:]}")
        return _Run(trace=trace, done_s=None)


def _check(driver: _Driver) -> None:
    """Compare the chain with what the devices made, and replay it."""
    campaign, fed = driver.campaign, open_federation(driver.config)
    made = {(client, 0, sequence) for client, target in driver.targets.items() for sequence in range(target)}
    folds = [sealed.entry.body.candidate for sealed in fed.chain.entries() if hasattr(sealed.entry.body, "candidate")]
    found = Counter((row.client_id, row.key_epoch, row.sequence) for fold in folds for row in fold.accepted)
    for client, target in driver.targets.items():
        _require_settled(device_config(driver.config, client, max(target, 1)).home)
    verify_log(fed.chain, fed.log)
    with tempfile.TemporaryDirectory() as scratch:
        stores = {"archive": fed.archive, "genesis": fed.blobs, "target": BlobStore(scratch)}
        results = list(replay(fed.chain, **stores, devices=fed.config.devices))
    campaign.updates = len(made)
    campaign.exactly_once = 100 * sum(found[claim] == 1 for claim in made) / len(made | set(found))
    campaign.versions = len(results)
    campaign.replayed = 100 * sum(result.verdict == "identical" for result in results) / len(results)
    campaign.duplicates = sum(row.reason == "duplicate" for fold in folds for row in fold.refused)
    fed.close()


def _require_settled(home: Path) -> None:
    """Raise if a device still holds an update that the chain has not named."""
    if not home.exists():
        return
    with Outbox(home / "outbox", max_bytes=1 << 30) as outbox:
        left = [*outbox.pending(), *outbox.unconfirmed(), *outbox.dead()]
    if left:
        raise RuntimeError(f"device {home.name} still holds {len(left)} updates, the oldest is {left[0].sequence}")


def main(kills: int = 200, updates: int = 300, seed: int = SEED) -> None:
    """Run a campaign and print it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        print(run_campaign(Path(directory), kills=kills, updates=updates, seed=seed))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Runs tier-1 work in forked processes that may be killed.

The modules are imported once; each scenario is a real process.

Usage: python -m tests.e2e.tier1_process DIRECTORY BOOTSTRAP SEED; prints one JSON document.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from fednested_lib.errors import ChainConflict, FednestedError
from fednested_lib.log import KafkaLog
from tests.federation import Device, make_workspace
from tier1.federation import open_federation
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.broadcast import publish_champion
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import decide, settle_candidate

assert KafkaLog  # imported before any fork

FAILPOINTS = [
    "durable.before_rename:1",
    "durable.before_rename:5",
    "fold.after_archive",
    "fold.after_blobs",
    "fold.after_candidate",
    "commit.before_append",
    "commit.after_append",
    "quarantine.after_publish",
    "registry.after_register",
    "journal.before_sync",
    "decide.after_append",
    "broadcast.before_event",
]
CORE_FAILPOINTS = ["core.after_training", "core.after_publish", "fold.after_blobs", "commit.before_append"]


def in_process(work, *, failpoint: str | None = None, kill_after_s: float | None = None) -> int:
    """Fork, work, and return the child's exit status (negative signal number when killed)."""
    child = os.fork()
    if child == 0:
        if failpoint:
            os.environ["FEDNESTED_FAILPOINT"] = failpoint
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            work()
        except ChainConflict:
            os._exit(75)
        except FednestedError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        except BaseException as error:
            import traceback

            traceback.print_exception(error)
            os._exit(2)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fast_round(config: Path) -> None:
    """Cut, fold, settle, approve: what a coordinator does; safe to run again after any crash."""
    fed = open_federation(config)
    settled = settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    decide(fed, settled, "approve", "console")


def whole_round(config: Path) -> None:
    """The same and the broadcast, which anchors this chain on the log that the copies share: for the last scenario."""
    fast_round(config)
    publish_champion(open_federation(config))


def core_round(config: Path) -> None:
    """A whole core update under one run name."""
    fed = open_federation(config)
    candidate = fold_dense(fed, train_delta(fed, pack_datasets(fed, authorise_training(fed, "core-1")), "core-1"))
    decide(fed, settle_candidate(fed, candidate), "approve", "console")


def outcome(config: Path) -> dict:
    """What must be equal whatever was killed: weights of head and champion, who is in with which weight, how often."""
    fed = open_federation(config)
    state = fed.chain.state()
    bodies = [sealed.entry.body for sealed in fed.chain.entries()]
    accepted = [row for body in bodies if hasattr(body, "candidate") for row in body.candidate.accepted]
    return {
        "head": state.head.base_digest,
        "champion": state.champion.base_digest,
        "weights": sorted((row.client_id, row.sequence, row.weight) for row in accepted),
        "versions": len(state.versions),
        "offsets": dict(state.offsets),
        "registry": fed.registry.get("champion").manifest_digest == state.champion.digest,
    }


def copy_of(directory: Path, name: str) -> Path:
    """Copy a workspace; returns its configuration."""
    target = directory.parent / name
    shutil.copytree(directory, target)
    return target / "tier1.yaml"


def recover(work, config: Path, *, tries: int = 5) -> list[int]:
    """Run again until it succeeds, as Flyte's retries do."""
    codes = []
    for _ in range(tries):
        codes.append(in_process(lambda: work(config)))
        if codes[-1] == 0:
            break
    return codes


def main() -> None:
    """Run every scenario and print what came out."""
    root, bootstrap, rng = Path(sys.argv[1]), sys.argv[2], random.Random(int(sys.argv[3]))
    warm_up(root / "warm")
    base = root / "base"
    config = make_workspace(base, bootstrap=bootstrap, core={"steps": 3})
    results: dict = {"failpoints": {}, "core": {}, "random": [], "seed": int(sys.argv[3])}

    assert in_process(lambda: core_round(config)) == 0
    core_base = root / "fresh"
    shutil.copytree(base, core_base)

    def send() -> None:
        fed = open_federation(config)
        for client in ("ann", "bob", "cyd"):
            Device(fed, client).send(base=1)
        bad = Device(fed, "ann", sequence=1).send(base=1)
        Device(fed, "ann").append(bad.to_bytes(), b"other bytes")  # refused: the quarantine has something to do

    assert in_process(send) == 0
    # First, because later runs find these records in quarantine already.
    quarantined = kill_and_recover(base, "quarantine.after_publish")
    reference = copy_of(base, "reference")
    assert in_process(lambda: fast_round(reference)) == 0
    results["reference"] = outcome_in_process(reference)
    apart = ("quarantine", "broadcast")
    results["failpoints"] = {name: kill_and_recover(base, name) for name in FAILPOINTS if not name.startswith(apart)}
    results["failpoints"]["quarantine.after_publish"] = quarantined
    began = time.monotonic()
    timing = copy_of(base, "timing")
    assert in_process(lambda: fast_round(timing)) == 0
    length_s = time.monotonic() - began
    for number in range(8):
        run, at_s = copy_of(base, f"random-{number}"), rng.uniform(0.0, length_s)
        killed = in_process(lambda run=run: fast_round(run), kill_after_s=at_s)
        codes = recover(fast_round, run)
        results["random"].append({"at_s": at_s, "killed": killed, "recovered": codes, **outcome_in_process(run)})
    results["race"] = race(base)
    for name in CORE_FAILPOINTS:
        run = make_workspace(root / f"core-{name.replace('.', '-')}", bootstrap=bootstrap, core={"steps": 3})
        killed = in_process(lambda run=run: core_round(run), failpoint=name)
        codes = recover(core_round, run)
        results["core"][name] = {"killed": killed, "recovered": codes, **outcome_in_process(run)}
    results["core_outcome"] = outcome_in_process(core_base / "tier1.yaml")
    results["failpoints"]["broadcast.before_event"] = kill_and_recover(base, "broadcast.before_event", whole_round)
    print(json.dumps(results))


def warm_up(directory: Path) -> None:
    """Import everything once, in the parent, on a log in memory, so that no fork pays for it."""
    config = make_workspace(directory, core={"steps": 1})
    core_round(config)
    Device(open_federation(config), "ann").send(base=1)
    fast_round(config)


def kill_and_recover(base: Path, name: str, work=fast_round) -> dict:
    """Run a round that dies at a failpoint, run it again until it ends, and say what came out."""
    run = copy_of(base, f"kill-{name.replace('.', '-').replace(':', '-')}")
    killed = in_process(lambda: work(run), failpoint=name)
    return {"killed": killed, "recovered": recover(work, run), **outcome_in_process(run)}


def race(base: Path) -> dict:
    """Two committers at once on one federation: a core update and a fold of devices, both made for version 1."""
    run = copy_of(base, "race")
    ready = run.parent / "go"

    def prepare() -> None:
        fed = open_federation(run)
        ref = fold_updates(fed, take_updates(fed))
        dense = fold_dense(fed, train_delta(fed, pack_datasets(fed, authorise_training(fed, "race")), "race"))
        (run.parent / "candidates.json").write_text(json.dumps([ref.digest, dense.digest]))

    assert in_process(prepare) == 0
    digests = json.loads((run.parent / "candidates.json").read_text())

    def commit(digest: str) -> None:
        from tier1.loops.records import CandidateRef

        while not ready.exists():
            time.sleep(0.001)
        settle_candidate(open_federation(run), CandidateRef(digest=digest, parent_version=1, n_accepted=0, n_refused=0))

    children = []
    for digest in digests:
        child = os.fork()
        if child == 0:
            try:
                commit(digest)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    ready.touch()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    fed = open_federation(run)
    tries = [
        [one.outcome for one in sealed.entry.body.tries]
        for sealed in fed.chain.entries()
        if sealed.entry.body.kind == "version"
    ]
    return {"codes": codes, "tries": tries[1:], "versions": len(fed.chain.state().versions)}


def outcome_in_process(config: Path) -> dict:
    """Read the outcome without opening a log connection in the parent, which forks."""
    return outcome(config)


if __name__ == "__main__":
    main()

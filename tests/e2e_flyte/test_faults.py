"""What breaks while Flyte runs us: a rank, a suite, a pod, a message that comes twice, a round that is still going."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import msgpack
import psutil

from fednested_lib.events import TrainingTask
from services.trigger.launch import ROUTES, order_of
from tests.e2e_flyte.conftest import PLACE, Site, registration
from tests.federation import Device, write_text
from tests.flyte.stand_in.executions import Execution
from tests.flyte.stand_in.server import FlyteStandIn
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.evaluate_and_promote import newest_candidate
from tier1.loops.gate_candidate import suite_registry
from tier1.versions.candidates import load_candidate

STEPS, EVERY = 60, 10


def test_a_killed_rank_is_retried_from_its_checkpoint(site: Site, flyte: FlyteStandIn, tmp_path: Path) -> None:
    """One of two ranks gets SIGKILL: the attempt is lost, the second goes on from Flyte's checkpoint to a candidate."""
    site.configure("core", steps=STEPS, checkpoint_every=EVERY, batch_size=4)
    trace = tmp_path / "trace"

    def inject(task: str, number: int, item: int | None) -> dict[str, str]:
        if number == 0:
            return {"FEDNESTED_FAILPOINT_TRACE": str(trace)}
        for own in (site.fed.home / "dense").glob("*.checkpoints"):
            shutil.rmtree(own)  # with it nothing is left but Flyte's
        return {}

    flyte.inject = inject
    try:
        launched = site.launch("core_update_elastic:core_update_2_cpu", "ranks")
        kill_rank("ranks", trace, after=3 * EVERY)  # of both: past the first checkpoint
        execution = site.succeed(launched, "ranks")
    finally:
        flyte.inject = lambda task, number, item: {}
    (train,) = execution.tasks("train_2_cpu")
    assert len(train.attempts) == 2
    first = pod_log(flyte, execution, train.path, 0)
    assert "was ended by SIGKILL" in first or "lost another rank" in first
    assert "checkpoint.restored" in pod_log(flyte, execution, train.path, 1)
    assert "core.resumed" in pod_log(flyte, execution, train.path, 1)
    fed = site.fed
    assert load_candidate(fed.home, newest_candidate(fed).digest).inputs.dense.run_id == "ranks"


def kill_rank(execution: str, trace: Path, *, after: int) -> None:
    """Kill one of the two ranks of an execution once they have made so many steps together."""
    deadline = time.monotonic() + 120
    while not trace.exists() or trace.read_text().count("core.after_step") < after:
        assert time.monotonic() < deadline, "the ranks made no step"
        time.sleep(0.01)
    ranks = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.environ().get("FLYTE_INTERNAL_EXECUTION_ID") == execution
            if is_ours and "spawn_main" in " ".join(process.cmdline()):
                ranks.append(process)
    assert len(ranks) == 2, ranks
    os.kill(max(ranks, key=lambda rank: rank.create_time()).pid, signal.SIGKILL)


def pod_log(flyte: FlyteStandIn, execution: Execution, node: str, attempt: int) -> str:
    return (flyte.root / "metadata" / execution.name / node / str(attempt) / "pod.log").read_text(errors="replace")


def test_a_suite_that_cannot_be_measured_passes_nothing(site: Site, flyte: FlyteStandIn) -> None:
    """Each of three mapped suites loses its first pod, one is damaged: two are measured, and the gate stays closed."""
    site.crown()
    fed = site.fed
    extra = {name: write_text(site.config.parent / f"{name}.jsonl", 40, seed) for seed, name in enumerate("ab", 3)}
    suite_registry(fed).register(extra)
    damaged = suite_registry(fed).suite("b").path
    damaged.write_bytes(damaged.read_bytes()[:-1])
    Device(fed, "ann").send()
    site.succeed(site.launch("aggregate_experts", "suites-fold"), "suites-fold")
    lost = {"FEDNESTED_FAILPOINT": "durable.before_rename"}
    flyte.inject = lambda task, number, item: lost if "measure_suite" in task and number == 0 else {}
    try:
        execution = site.succeed(site.launch("evaluate_suites", "suites"), "suites")
    finally:
        flyte.inject = lambda task, number, item: {}
    measured = msgpack.unpackb(execution.outputs.literals["o0"].scalar.binary.value)
    assert ([loss["suite"] for loss in measured["losses"]], measured["missing"]) == (["a", "plays"], ["b"])
    assert [len(item.attempts) for item in execution.tasks("measure_suite")] == [2, 2, 2]
    said = site.launch("evaluate_and_promote", "suites-gate").end()
    assert said.status != 0
    assert "suite 'b' must have digest" in said.text
    state = fed.chain.state()
    assert (state.head.version, state.champion.version) == (1, 1)


def test_a_shard_has_the_retries_of_its_map_node_and_a_lost_one_costs_no_candidate(
    site: Site, flyte: FlyteStandIn
) -> None:
    """Of three shards one loses each of six pods, where its task's own retries would give four: the candidate is whole.

    It is that of one task. Regions are mapped beside it, and each of them loses its first pod.
    """
    site.crown()
    for client in ("ann", "bob"):
        Device(site.fed, client).send()
    lost = {"FEDNESTED_FAILPOINT": "durable.before_rename"}

    def inject(task: str, number: int, item: int | None) -> dict[str, str]:
        if "fold_shard" in task and item == 1:
            return lost
        return lost if "hear_region" in task and number == 0 else {}

    flyte.inject = inject
    try:
        launched = site.launch("aggregate_experts_sharded", "shards", "--shards", "3")
        engine = site.succeed(site.launch("data_engine_regions", "regions"), "regions")
        execution = site.succeed(launched, "shards")
    finally:
        flyte.inject = lambda task, number, item: {}
    assert [len(item.attempts) for item in execution.tasks("fold_shard")] == [1, 6, 1]
    assert [item.error is None for item in execution.tasks("fold_shard")] == [True, False, True]
    assert [len(item.attempts) for item in engine.tasks("hear_region")] == [2]
    fed = site.fed
    with contextlib.closing(fed):
        digest = msgpack.unpackb(execution.outputs.literals["o0"].scalar.binary.value)["digest"]
        assert digest == fold_updates(fed, take_updates(fed)).digest


def test_a_message_that_comes_twice_is_one_execution_and_a_second_round_waits(site: Site, flyte: FlyteStandIn) -> None:
    """The trigger meets its own execution; a task for a plan at its limit is skipped, kept, and launched afterwards."""
    site.crown()
    Device(site.fed, "ann").send()
    register(site, "twice")
    said = site.call("pyflyte", "launchplan", *PLACE, "--activate", "nested_round_fast", "twice")
    assert said.status == 0, said.text
    first, second = (request(site, task_id) for task_id in ("t1", "t2"))
    request(site, "t1")
    trigger = site.start("python", "-m", "services.trigger", "--config", str(site.config), "--poll-s", "0.1")
    site.wait_for_gate(first)
    trigger.wait_for("skipped: the launch plan's concurrency policy")
    assert second not in flyte.runs
    site.decide("approve", first)
    assert [flyte.wait_for_end(name).phase for name in (first, second)] == ["SUCCEEDED", "SUCCEEDED"]
    trigger.process.send_signal(signal.SIGTERM)
    said = trigger.end()
    assert said.status == 0, said.text
    assert [flyte.admitted.count(name) for name in (first, second)] == [1, 1]
    assert flyte.rpcs["AdminService/CreateExecution"] > 2
    assert site.fed.chain.state().champion.version == 2


def register(site: Site, version: str) -> None:
    """Register workflows and launch plans, whose configuration is a file in the store."""
    said = site.call("pyflyte", *registration(version), FEDNESTED_CONFIG_URI=str(site.config))
    assert said.status == 0, said.text


def request(site: Site, task_id: str) -> str:
    """Ask the trigger for a round, and return the name that its execution has."""
    fed = site.fed
    task = TrainingTask(federation=fed.config.federation, task_id=task_id, kind="aggregate")
    with contextlib.closing(fed):
        fed.request(task)
    return order_of(task, ROUTES).name

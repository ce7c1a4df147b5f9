"""What Flyte would register: every workflow and launch plan packaged offline and compared with package.yaml.

After a wanted change: `python -m tests.flyte.packaged --write` renews the file; read its diff before you commit it.
"""

from __future__ import annotations

import difflib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flyteidl.admin import launch_plan_pb2

from tests.flyte.packaged import RENEW, ROOT, SNAPSHOT, of_this_checkout, package, read, snapshot

LOOPS = (
    "core_update",
    "aggregate_experts",
    "evaluate_and_promote",
    "broadcast",
    "nested_round",
    "sensed_round",
    "data_engine",
    "evaluate_suites",
    "aggregate_experts_sharded",
    "data_engine_regions",
)
SENSORS = {"tasks.sensors.kafka_window.kafka_window": "fednested_kafka_window"}


@pytest.fixture(scope="module")
def entities() -> dict[str, Any]:
    return of_this_checkout()


@pytest.mark.slow
def test_the_package_is_the_committed_one(entities: dict[str, Any]) -> None:
    """Whatever would be registered otherwise (types, order, resources, retries, schedules …) is seen in review."""
    found, committed = snapshot(entities).splitlines(), SNAPSHOT.read_text().splitlines()
    diff = "\n".join(difflib.unified_diff(committed, found, "package.yaml", "this checkout", lineterm="", n=6))
    assert not diff, f"\n{diff}\nif this is wanted: {RENEW}"


@pytest.mark.slow
def test_every_loop_states_its_update_rule(entities: dict[str, Any]) -> None:
    """The console shows a workflow's first docstring line: it is the update rule."""
    for loop in LOOPS:
        assert "←" in entities[f"workflows.{loop}.{loop}"].description.short_description


@pytest.mark.slow
def test_a_schedule_leaves_no_input_open(entities: dict[str, Any]) -> None:
    """A scheduled plan with an open input fails at its first turn; one without SKIP piles up behind a waiting gate."""
    plans = {name: spec.spec for name, spec in entities.items() if isinstance(spec, launch_plan_pb2.LaunchPlan)}
    rounds = {"nested_round_fast", "nested_round_nightly", "sensed_round"}
    assert set(plans) == rounds | {"data_engine_hourly", "core_update_8_gpu_nightly"}
    for plan in plans.values():
        inputs = entities[plan.workflow_id.name].template.interface.inputs.variables
        assert set(inputs) == set(plan.fixed_inputs.literals)
        assert plan.concurrency_policy.max == 1
        assert plan.max_parallelism >= 1
        assert plan.labels.values["fednested-loop"]
        assert plan.security_context.run_as.k8s_service_account == "fednested"
        assert plan.entity_metadata.schedule.WhichOneof("ScheduleExpression")


@pytest.mark.slow
def test_what_a_connector_serves_asks_for_no_pod(entities: dict[str, Any]) -> None:
    """The sensor's type is the one that the platform's values enable for the connector service; it has no container."""
    served = {name: spec for name, spec in entities.items() if name in SENSORS}
    assert {name: spec.template.type for name, spec in served.items()} == SENSORS
    assert not any(spec.template.HasField("container") for spec in served.values())


def test_registering_loads_no_loop() -> None:
    """What a workflow names are records: the code of a loop is loaded where it runs."""
    program = (
        "import sys, workflows.data_engine; "
        "print([name for name in sys.modules if name in ('tier1.loops.data_engine', 'tier1.loops.findings')])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split("\n")[-2] == "[]"


def test_no_plan_activates_itself() -> None:
    """Registering from a laptop must not start a production schedule."""
    from launchplans import gpu, schedules

    plans = [*schedules.PLANS, *gpu.PLANS]
    assert len(plans) == 5
    assert not any(plan.should_auto_activate for plan in plans)


@pytest.mark.slow
def test_plans_carry_what_the_registering_shell_says(tmp_path: Path) -> None:
    """One set per region, each with its own tier1.yaml, label, service account and people to notify."""
    said = {
        "FEDNESTED_REGIONS": "eu,us",
        "FEDNESTED_CONFIG_URI": "s3://acme/{region}/tier1.yaml",
        "FEDNESTED_SERVICE_ACCOUNT": "moe",
        "FEDNESTED_NOTIFY": "ops@example.org",
    }
    package(tmp_path / "package.tgz", **said)
    found = read(tmp_path / "package.tgz")
    plans = {name: spec.spec for name, spec in found.items() if isinstance(spec, launch_plan_pb2.LaunchPlan)}
    assert len(plans) == 10
    for name, plan in plans.items():
        region = name.rsplit("_", 1)[1]
        assert plan.fixed_inputs.literals["config"].scalar.blob.uri == f"s3://acme/{region}/tier1.yaml"
        assert plan.labels.values["fednested-region"] == region
        assert plan.security_context.run_as.k8s_service_account == "moe"
        (notification,) = plan.entity_metadata.notifications
        assert list(notification.email.recipients_email) == ["ops@example.org"]
        assert len(notification.phases) == 3
    one = {"FEDNESTED_REGIONS": "eu", "FEDNESTED_CONFIG_URI": "s3://acme/tier1.yaml"}
    with pytest.raises(AssertionError, match="must contain {region}"):
        package(tmp_path / "package.tgz", modules=("launchplans.schedules",), **one)


def test_tasks_are_bounded_and_uncached() -> None:
    """Every task has an image, a request and retries; none is cached, for each reads the chain beside its inputs.

    Routers have no retries: Flyte would ask the person, or train, once more.
    """
    from flytekit.core.python_function_task import PythonFunctionTask

    from tasks import aggregation, data_engine, evaluation, failures, promotion, publishing, training
    from tasks.control import decision
    from tasks.gpu import train
    from workflows import nested_round

    modules = (
        aggregation,
        data_engine,
        evaluation,
        failures,
        promotion,
        publishing,
        training,
        train,
        decision,
        nested_round,
    )
    found = [value for module in modules for value in vars(module).values() if isinstance(value, PythonFunctionTask)]
    assert len(found) >= 20
    for shell in found:
        assert shell.container_image is not None, shell.name
        assert shell.resources.requests.mem, shell.name
        assert (shell.metadata.retries >= 2) == (shell.execution_mode is shell.ExecutionBehavior.DEFAULT), shell.name
        assert not shell.metadata.cache, shell.name
        assert not shell.deck_fields, f"{shell.name}: the default deck fields cost two seconds per task"

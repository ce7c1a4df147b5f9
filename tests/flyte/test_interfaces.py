"""What Flyte would register: every workflow and launch plan packaged offline and compared with interfaces.json.

After a wanted change: `python tests/flyte/test_interfaces.py` writes the file anew; read the diff before you commit it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from flyteidl.admin import launch_plan_pb2, task_pb2, workflow_pb2
from flyteidl.core import types_pb2
from google.protobuf.json_format import MessageToDict

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("interfaces.json")
SPECS = {1: task_pb2.TaskSpec, 2: workflow_pb2.WorkflowSpec, 3: launch_plan_pb2.LaunchPlan}
LOOPS = (
    "core_update",
    "aggregate_experts",
    "evaluate_and_promote",
    "broadcast",
    "nested_round",
    "sensed_round",
    "data_engine",
)
SENSORS = {"tasks.sensors.kafka_window.kafka_window": "fednested_kafka_window"}


def package(directory: Path) -> dict[str, object]:
    """Run `pyflyte package` and return name → protobuf; a workflow's default launch plan is left out."""
    archive = directory / "package.tgz"
    command = [
        sys.executable,
        "-m",
        "flytekit.clis.sdk_in_container.pyflyte",
        "--pkgs",
        "workflows",
        "--pkgs",
        "launchplans",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FEDNESTED_")}
    subprocess.run(
        [*command, "package", "--copy", "all", "--output", str(archive), "--force"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        timeout=300,
    )
    entities: dict[str, object] = {}
    with tarfile.open(archive) as tar:
        members = [name for name in tar.getnames() if name.endswith(".pb")]
        for member in sorted(members, key=lambda name: name.rsplit("_", 1)[1]):  # a workflow before its default plan
            name, kind = member.removesuffix(".pb").split("_", 1)[1].rsplit("_", 1)
            entities.setdefault(name, SPECS[int(kind)].FromString(tar.extractfile(member).read()))
    return entities


def type_name(literal: types_pb2.LiteralType) -> str:
    kind = literal.WhichOneof("type")
    if kind == "blob":
        return f"file[{literal.blob.format}]"
    if kind == "collection_type":
        return f"list[{type_name(literal.collection_type)}]"
    if kind == "map_value_type":
        return f"map[{type_name(literal.map_value_type)}]"
    if kind == "union_type":
        return " | ".join(type_name(variant) for variant in literal.union_type.variants)
    if kind == "simple" and literal.simple == types_pb2.STRUCT:
        fields = literal.structure.dataclass_type
        inside = ", ".join(f"{name}: {type_name(fields[name])}" for name in sorted(fields))
        return f"{literal.metadata['title']}({inside})"
    if kind == "simple":
        return types_pb2.SimpleType.Name(literal.simple).lower()
    raise AssertionError(f"the snapshot does not know {kind}: extend type_name")


def describe(spec: object) -> dict:
    if isinstance(spec, launch_plan_pb2.LaunchPlan):
        return MessageToDict(spec.spec, preserving_proto_field_name=True)
    interface = spec.template.interface
    described = {
        "inputs": {key: type_name(value.type) for key, value in interface.inputs.variables.items()},
        "outputs": {key: type_name(value.type) for key, value in interface.outputs.variables.items()},
    }
    if isinstance(spec, task_pb2.TaskSpec):
        described["retries"] = spec.template.metadata.retries.retries
        if not spec.template.HasField("container"):  # a connector serves it, no pod
            return {**described, "type": spec.template.type}
        return {**described, "image": spec.template.container.image.rsplit("/", 1)[1].split(":")[0]}
    described["on_failure"] = spec.template.failure_node.task_node.reference_id.name
    return {**described, "nodes": [describe_node(node) for node in spec.template.nodes]}


def describe_node(node: workflow_pb2.WorkflowSpec) -> str:
    reference = node.task_node.reference_id.name or node.workflow_node.sub_workflow_ref.name
    return f"{node.id} {reference} after [{', '.join(sorted(node.upstream_node_ids))}]"


def snapshot_of(entities: dict[str, object]) -> str:
    described = {name: describe(spec) for name, spec in entities.items()}
    return json.dumps(described, indent=2, sort_keys=True) + "\n"


@pytest.fixture(scope="module")
def entities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return package(tmp_path_factory.mktemp("package"))


@pytest.mark.slow
def test_interfaces_are_those_of_the_snapshot(entities: dict[str, object]) -> None:
    """A task, workflow or launch plan that changes its name, types, order or schedule is seen in review."""
    assert snapshot_of(entities) == SNAPSHOT.read_text(), "if wanted: python tests/flyte/test_interfaces.py"


@pytest.mark.slow
def test_every_loop_states_its_update_rule(entities: dict[str, object]) -> None:
    """The console shows a workflow's first docstring line: it is the update rule."""
    for loop in LOOPS:
        assert "←" in entities[f"workflows.{loop}.{loop}"].description.short_description


@pytest.mark.slow
def test_a_schedule_leaves_no_input_open(entities: dict[str, object]) -> None:
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
        assert plan.entity_metadata.schedule.WhichOneof("ScheduleExpression")


@pytest.mark.slow
def test_what_a_connector_serves_asks_for_no_pod(entities: dict[str, object]) -> None:
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[-2] == "[]"


def test_no_plan_activates_itself() -> None:
    """Registering from a laptop must not start a production schedule."""
    from launchplans import gpu, schedules

    for plan in (schedules.fast, schedules.sensed, schedules.nightly, schedules.engine, gpu.nightly_gpu):
        assert not plan.should_auto_activate


def test_tasks_are_bounded_and_uncached() -> None:
    """Every task has an image, a request and retries; none is cached, for each reads the chain beside its inputs.

    Routers have no retries: Flyte would ask the person, or train, once more.
    """
    from flytekit.core.python_function_task import PythonFunctionTask

    from tasks import aggregation, data_engine, failures, promotion, publishing, training
    from tasks.control import decision
    from tasks.gpu import train
    from workflows import nested_round

    modules = (aggregation, data_engine, failures, promotion, publishing, training, train, decision, nested_round)
    found = [value for module in modules for value in vars(module).values() if isinstance(value, PythonFunctionTask)]
    assert len(found) >= 20
    for shell in found:
        assert shell.container_image is not None, shell.name
        assert shell.resources.requests.mem, shell.name
        assert (shell.metadata.retries >= 2) == (shell.execution_mode is shell.ExecutionBehavior.DEFAULT), shell.name
        assert not shell.metadata.cache, shell.name
        assert not shell.deck_fields, f"{shell.name}: the default deck fields cost two seconds per task"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        SNAPSHOT.write_text(snapshot_of(package(Path(scratch))))

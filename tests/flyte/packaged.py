"""What Flyte would register, read from the protobufs of `pyflyte package`, as text that a person can review.

    python -m tests.flyte.packaged            # print it
    python -m tests.flyte.packaged --write    # after a wanted change: renew package.yaml, and read its diff

Tags of images and versions are left out: they change with every edit. What a `@dynamic` puts into its sub-workflow is
decided at run time and is in no package, the gate of `ask_secops` excepted, which is compiled here.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import yaml
from flyteidl.admin import launch_plan_pb2, schedule_pb2, task_pb2, workflow_pb2
from flyteidl.core import tasks_pb2, types_pb2
from google.protobuf.json_format import MessageToDict

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("package.yaml")
RENEW = "python -m tests.flyte.packaged --write"
SPECS = {1: task_pb2.TaskSpec, 2: workflow_pb2.WorkflowSpec, 3: launch_plan_pb2.LaunchPlan}
PYFLYTE = (sys.executable, "-m", "flytekit.clis.sdk_in_container.pyflyte")
ALL = ("workflows", "launchplans")
HASH = re.compile(r"(?<=map_)(\w+)_[0-9a-f]{32}-arraynode")  # flytekit's name of a mapped task, over its bound inputs


def package(
    archive: Path,
    *,
    modules: tuple[str, ...] = ALL,
    copy: str = "all",
    program: tuple[str, ...] = PYFLYTE,
    **variables: str,
) -> None:
    """Run `pyflyte package` on this checkout, without a network and without building an image."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FEDNESTED_", "FLYTE_"))}
    # With a Docker daemon flytekit would build and push images that the registry lacks.
    environment = {**kept, "PYTHONPATH": str(ROOT), "DOCKER_HOST": "unix:///dev/null", **variables}
    chosen = [word for module in modules for word in ("--pkgs", module)]
    command = [*program, *chosen, "package", "--copy", copy, "--output", str(archive), "--force"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def read(archive: Path) -> dict[str, Any]:
    """Return name → protobuf of every entity; a workflow's default launch plan is left out."""
    entities: dict[str, Any] = {}
    with tarfile.open(archive) as tar:
        members = [name for name in tar.getnames() if name.endswith(".pb")]
        for member in sorted(members, key=lambda name: name.rsplit("_", 1)[1]):  # a workflow before its default plan
            name, kind = member.removesuffix(".pb").split("_", 1)[1].rsplit("_", 1)
            entities.setdefault(name, SPECS[int(kind)].FromString(tar.extractfile(member).read()))
    return entities


def snapshot(entities: dict[str, Any]) -> str:
    """Return the reviewable text of a package."""
    sections: dict[str, dict] = {"launch plans": {}, "workflows": {}, "tasks": {}}
    for name, spec in sorted(entities.items()):
        if isinstance(spec, launch_plan_pb2.LaunchPlan):
            sections["launch plans"][name] = _plan(spec.spec)
        elif isinstance(spec, workflow_pb2.WorkflowSpec):
            sections["workflows"][name] = _workflow(spec.template)
        else:
            sections["tasks"][_plain(name)] = _task(spec.template)
    sections["gates"] = decision_gate()
    heading = f"# What Flyte would register; renew with `{RENEW}`.\n"
    return heading + yaml.safe_dump(sections, sort_keys=False, width=120, allow_unicode=True)


def decision_gate() -> dict:
    """Compile the router of the outer loop for a version that waits, and describe the gate it puts up."""
    from flytekit.configuration import ImageConfig, SerializationSettings
    from flytekit.core.context_manager import ExecutionState, FlyteContextManager

    from tasks.control.decision import ask_secops
    from tier1.loops.records import Settled

    waiting = Settled(status="head", version=1, manifest="", candidate="", tries=1, reason="")
    settings = SerializationSettings(ImageConfig.auto_default_image(), project="p", domain="d", version="v")
    context = FlyteContextManager.current_context().with_serialization_settings(settings)
    state = context.new_execution_state().with_params(mode=ExecutionState.Mode.TASK_EXECUTION)
    with FlyteContextManager.with_context(context.with_execution_state(state)) as inside:
        job = ask_secops.compile_into_workflow(inside, ask_secops.task_function, settled=waiting)
    (node,) = [node.to_flyte_idl() for node in job.nodes if node.gate_node is not None]
    signal = node.gate_node.signal
    described = {"type": type_name(signal.type), "timeout": _seconds(node.metadata.timeout)}
    return {f"{signal.signal_id} in tasks.control.decision.ask_secops": described}


def type_name(literal: types_pb2.LiteralType) -> str:
    """Return a Flyte type as one would write it."""
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


def _interface(interface: Any) -> dict:
    sides = {"inputs": interface.inputs.variables, "outputs": interface.outputs.variables}
    return {side: {name: type_name(found[name].type) for name in sorted(found)} for side, found in sides.items()}


def _plan(spec: launch_plan_pb2.LaunchPlanSpec) -> dict:
    described = MessageToDict(spec, preserving_proto_field_name=True)
    described["workflow_id"] = spec.workflow_id.name
    literals = described.pop("fixed_inputs", {}).get("literals", {})
    described |= described.pop("entity_metadata", {})
    described["schedule"] = _schedule(spec.entity_metadata.schedule)
    described["fixed_inputs"] = {name: _value(literal) for name, literal in sorted(literals.items())}
    return {key: value for key, value in sorted(described.items()) if value not in ({}, None)}


def _schedule(schedule: Any) -> str:
    if schedule.HasField("rate"):
        return f"every {schedule.rate.value} {schedule_pb2.FixedRateUnit.Name(schedule.rate.unit).lower()}"
    return f"cron {schedule.cron_schedule.schedule}"


def _value(literal: dict) -> Any:
    scalar = literal["scalar"]
    return next(iter(scalar["primitive"].values())) if "primitive" in scalar else scalar["blob"]["uri"]


def _workflow(template: Any) -> dict:
    return {
        **_interface(template.interface),
        "on_failure": template.failure_node.task_node.reference_id.name,
        "nodes": [_node(node) for node in template.nodes],
    }


def _node(node: Any) -> str:
    after = f"after [{', '.join(sorted(node.upstream_node_ids))}]"
    if node.WhichOneof("target") == "array_node":
        array = node.array_node
        retries = array.node.metadata.retries.retries  # the map node's; propeller does not read the task's here
        return (
            f"{node.id} {_plain(array.node.task_node.reference_id.name)} {after}, {array.parallelism} at once, "
            f"{retries} retries of each item, success ratio {array.min_success_ratio:g}"
        )
    if node.WhichOneof("target") == "gate_node":
        return f"{node.id} gate {node.gate_node.signal.signal_id}"
    reference = node.task_node.reference_id.name or node.workflow_node.sub_workflow_ref.name
    return f"{node.id} {reference} {after}"


def _plain(name: str) -> str:
    return HASH.sub(r"\1", name)


def _task(template: tasks_pb2.TaskTemplate) -> dict:
    described = {"type": template.type, **_interface(template.interface)}
    metadata = template.metadata
    described |= {"retries": metadata.retries.retries, "timeout": _seconds(metadata.timeout)}
    if metadata.WhichOneof("interruptible_value"):
        described["interruptible"] = metadata.interruptible
    if metadata.discoverable:
        described["cache"] = metadata.discovery_version
    if metadata.generates_deck.value:
        described["deck"] = True
    if template.HasField("container"):  # else a connector serves it, no pod
        described |= _container(template.container)
    if template.HasField("extended_resources"):
        described["extended_resources"] = _sorted(template.extended_resources)
    if template.custom:
        described["custom"] = _sorted(template.custom)
    if secrets := template.security_context.secrets:
        described["secrets"] = [f"{secret.group}/{secret.key}" for secret in secrets]
    return described


def _container(container: tasks_pb2.Container) -> dict:
    names = tasks_pb2.Resources.ResourceName.Name
    environment = {pair.key: pair.value for pair in container.env}
    described: dict = {"image": container.image.rsplit("/", 1)[1].split(":")[0]}
    if environment.pop("_F_SS_C", None):
        described["dynamic"] = True
    for side in ("requests", "limits"):
        found = {names(entry.name).lower(): entry.value for entry in getattr(container.resources, side)}
        described |= {side: dict(sorted(found.items()))} if found else {}
    return described | ({"environment": dict(sorted(environment.items()))} if environment else {})


def _sorted(message: Any) -> dict:
    """Return a message as a dictionary; the order of a map's keys is another one in every process."""
    return json.loads(json.dumps(MessageToDict(message, preserving_proto_field_name=True), sort_keys=True))


def _seconds(duration: Any) -> str:
    return f"{duration.seconds} s"


@functools.cache
def of_this_checkout() -> dict[str, Any]:
    """Package this checkout and return its entities."""
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "package.tgz"
        package(archive)
        return read(archive)


if __name__ == "__main__":
    text = snapshot(of_this_checkout())
    if "--write" in sys.argv:
        SNAPSHOT.write_text(text)
    else:
        print(text)

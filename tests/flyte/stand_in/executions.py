"""Executions: admitted under admin's rules, then run by propeller in a thread each.

a bad name, an input that is missing, unknown or of another type   INVALID_ARGUMENT
a name that is taken, a plan that is at its limit (SKIP)           ALREADY_EXISTS
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field

import grpc
from flyteidl.admin import execution_pb2, launch_plan_pb2, node_execution_pb2
from flyteidl.core import execution_pb2 as phases
from flyteidl.core import identifier_pb2, literals_pb2, types_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from tests.flyte.stand_in.catalog import Refused

MAPPED = re.compile(r"map_(\w+)_[0-9a-f]{32}-arraynode")  # flytekit's name of a mapped task, over its bound inputs
Phase = phases.WorkflowExecution
OVER = (Phase.SUCCEEDED, Phase.FAILED, Phase.ABORTED, Phase.TIMED_OUT)


@dataclass(kw_only=True)
class NodeRun:
    """What became of a node.

    Args:
        path: its id, with those of the nodes it is inside of in front.
        spec_id: its id in its graph.
        attempts: (exit status, seconds) of each pod.
        is_array: it is a mapped task's.
    """

    path: str
    spec_id: str
    phase: int = phases.NodeExecution.RUNNING
    inputs: literals_pb2.LiteralMap = field(default_factory=literals_pb2.LiteralMap)
    outputs: literals_pb2.LiteralMap = field(default_factory=literals_pb2.LiteralMap)
    error: phases.ExecutionError | None = None
    task: str = ""
    attempts: list[tuple[int | None, float]] = field(default_factory=list)
    is_array: bool = False


@dataclass(kw_only=True)
class Execution:
    """One execution: admin's record of it, and what propeller did."""

    record: execution_pb2.Execution
    inputs: literals_pb2.LiteralMap
    outputs: literals_pb2.LiteralMap = field(default_factory=literals_pb2.LiteralMap)
    nodes: dict[str, NodeRun] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.record.id.name

    @property
    def is_over(self) -> bool:
        return self.record.closure.phase in OVER

    @property
    def phase(self) -> str:
        return Phase.Phase.Name(self.record.closure.phase)

    @property
    def error(self) -> phases.ExecutionError:
        return self.record.closure.error

    def tasks(self, name: str) -> list[NodeRun]:
        """Return the runs of a task, by the last part of its name; of a mapped one, its items in their order."""
        found = [node for node in self.nodes.values() if MAPPED.sub(r"\1", node.task).rsplit(".", 1)[-1] == name]
        return sorted(found, key=lambda node: node.path)

    def finish(self, phase: int, error: phases.ExecutionError | None = None) -> None:
        """Record how it ended."""
        if error is not None:
            self.record.closure.error.CopyFrom(error)
        self.seconds = time.monotonic() - self.began
        self.record.closure.updated_at.CopyFrom(now())
        self.record.closure.phase = phase


def now() -> Timestamp:
    """Return this moment."""
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp


def inputs_of(
    plan: launch_plan_pb2.LaunchPlan, interface: types_pb2.LiteralType, given: literals_pb2.LiteralMap
) -> literals_pb2.LiteralMap:
    """Return the inputs of an execution: given ones, defaults of the plan, and what the plan fixes."""
    expected, fixed = plan.closure.expected_inputs.parameters, plan.spec.fixed_inputs.literals
    inputs = literals_pb2.LiteralMap()
    for name, literal in given.literals.items():
        if name not in expected:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"invalid input {name}")
        if not _fits(literal, expected[name].var.type):
            wanted = types_pb2.SimpleType.Name(expected[name].var.type.simple)
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"invalid {name} input wrong type. Expected {wanted}")
        inputs.literals[name].CopyFrom(literal)
    for name, parameter in expected.items():
        if name not in inputs.literals:
            if parameter.required:
                raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"expected_inputs {name} missing")
            inputs.literals[name].CopyFrom(parameter.default)
    for name, literal in fixed.items():
        inputs.literals[name].CopyFrom(literal)
    return inputs


_SIMPLE = {
    types_pb2.INTEGER: "integer",
    types_pb2.FLOAT: "float_value",
    types_pb2.STRING: "string_value",
    types_pb2.BOOLEAN: "boolean",
}


def _fits(literal: literals_pb2.Literal, kind: types_pb2.LiteralType) -> bool:
    """Tell whether a literal is of a type: exactly for primitives, by its form for the others that we have."""
    if kind.WhichOneof("type") == "blob":
        return literal.scalar.HasField("blob")
    if kind.WhichOneof("type") == "simple" and kind.simple in _SIMPLE:
        return literal.scalar.primitive.WhichOneof("value") == _SIMPLE[kind.simple]
    return True


def admitted(
    request: execution_pb2.ExecutionCreateRequest, workflow: identifier_pb2.Identifier, name: str
) -> execution_pb2.Execution:
    """Return admin's record of a new execution."""
    identifier = identifier_pb2.WorkflowExecutionIdentifier(project=request.project, domain=request.domain, name=name)
    closure = execution_pb2.ExecutionClosure(workflow_id=workflow, phase=Phase.RUNNING)
    closure.created_at.CopyFrom(now())
    closure.started_at.CopyFrom(now())
    closure.updated_at.CopyFrom(now())
    return execution_pb2.Execution(id=identifier, spec=request.spec, closure=closure)


def node_execution(execution: Execution, node: NodeRun) -> node_execution_pb2.NodeExecution:
    """Return a node's run as admin shows it."""
    closure = node_execution_pb2.NodeExecutionClosure(phase=node.phase)
    closure.created_at.CopyFrom(execution.record.closure.created_at)
    closure.updated_at.CopyFrom(now())
    if node.error is not None:
        closure.error.CopyFrom(node.error)
    return node_execution_pb2.NodeExecution(
        id=identifier_pb2.NodeExecutionIdentifier(node_id=node.path, execution_id=execution.record.id),
        closure=closure,
        metadata=node_execution_pb2.NodeExecutionMetaData(spec_node_id=node.spec_id, is_array=node.is_array),
    )

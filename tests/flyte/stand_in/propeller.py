"""Propeller's part: walks the graph of an execution; what it says is what flytepropeller 1.16 says, as read.

    task        attempts = retries + 1, another only after a recoverable error; each gets the last one's checkpoints
    gate        waits for its signal; after its time-out one attempt is over, and a gate has no other
    array node  its items side by side, as many as its concurrency, each with the map node's retries and not the task's;
                None for one that failed, if enough succeed
    dynamic     the graph that the pod wrote
    failure node  runs after any failure of its workflow, with the error as `err`; that error stays the outcome

A failed node stops its graph: no node is started after it, gates give up, pods that run are left to end.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flyteidl.core import dynamic_job_pb2, errors_pb2, identifier_pb2, literals_pb2, tasks_pb2
from flyteidl.core import execution_pb2 as phases
from flyteidl.core import workflow_pb2 as graph_pb2

from tests.flyte.stand_in.catalog import Key, key_of
from tests.flyte.stand_in.connectors import ConnectorTask
from tests.flyte.stand_in.executions import Execution, NodeRun, Phase
from tests.flyte.stand_in.literals import NOTHING, START, bind, error_union, promised, void_union
from tests.flyte.stand_in.pods import Pod, base_environment

if TYPE_CHECKING:
    from tests.flyte.stand_in.server import FlyteStandIn

USER, SYSTEM = phases.ExecutionError.USER, phases.ExecutionError.SYSTEM
CORES = 2
UNBOUNDED_S = 600.0  # for a task that has no time-out of its own
MAX_MESSAGE = 4000


class NodeFailed(Exception):
    """A node is over; `node` is its id in the graph that fails with it."""

    def __init__(self, error: phases.ExecutionError, node: str = ""):
        super().__init__(error.message)
        self.error, self.node = error, node


@dataclass(frozen=True)
class Scope:
    """What the nodes of one graph share.

    Args:
        prefix: of their paths.
        workflows: sub-workflows that they may call.
        tasks: templates that only a dynamic's graph has.
        outer: the scope of the node that this graph is inside of.
    """

    prefix: str
    workflows: dict[Key, graph_pb2.WorkflowTemplate]
    tasks: dict[Key, tasks_pb2.TaskTemplate] = field(default_factory=dict)
    outer: Scope | None = None
    failed: threading.Event = field(default_factory=threading.Event)

    @property
    def is_failed(self) -> bool:
        return self.failed.is_set() or (self.outer is not None and self.outer.is_failed)

    def inside(self, path: str, workflows: dict | None = None, tasks: dict | None = None) -> Scope:
        """Return the scope of a graph inside a node."""
        return Scope(f"{path}-0-", {**self.workflows, **(workflows or {})}, {**self.tasks, **(tasks or {})}, self)


@dataclass(frozen=True)
class Attempt:
    """What an attempt came to: outputs, or the graph of a dynamic, or an error that may pass or not."""

    outputs: literals_pb2.LiteralMap | None = None
    graph: dynamic_job_pb2.DynamicJobSpec | None = None
    error: phases.ExecutionError | None = None
    recoverable: bool = False


def failure(code: str, message: str, kind: int = USER) -> phases.ExecutionError:
    """Return an execution error."""
    return phases.ExecutionError(code=code, message=message[-MAX_MESSAGE:], kind=kind)


class Propeller:
    """Runs one execution.

    Args:
        flyte: gives entities, pods, signals and time.
        execution: as admitted.
    """

    def __init__(self, flyte: FlyteStandIn, execution: Execution):
        self._flyte, self._execution = flyte, execution
        self._root = flyte.root / "metadata" / execution.name

    def run(self) -> None:
        """Run to the end, whatever it is."""
        execution = self._execution
        try:
            found = self._flyte.catalog.get(execution.record.closure.workflow_id)
            scope = Scope("", {key_of(each.id): each for each in found.spec.sub_workflows})
            execution.outputs.CopyFrom(self._workflow(found.spec.template, execution.inputs, scope))
        except NodeFailed as failed:
            over = Phase.ABORTED if execution.stop.is_set() else Phase.FAILED
            execution.finish(over, failed.error)
        except Exception:
            execution.finish(Phase.FAILED, failure("StandIn", traceback.format_exc(), SYSTEM))
        else:
            execution.finish(Phase.SUCCEEDED)
        self._flyte.tell()

    # graphs -------------------------------------------------------------------------------------------------------

    def _workflow(
        self, template: graph_pb2.WorkflowTemplate, inputs: literals_pb2.LiteralMap, scope: Scope
    ) -> literals_pb2.LiteralMap:
        known = {START: inputs}
        try:
            self._graph(template.nodes, known, scope)
        except NodeFailed as failed:
            if template.failure_node.id and not self._execution.stop.is_set():
                self._handle(template.failure_node, failed, inputs, scope)
            raise
        return bind(template.outputs, known)

    def _handle(self, node: graph_pb2.Node, failed: NodeFailed, inputs: literals_pb2.LiteralMap, scope: Scope) -> None:
        given = bind(node.inputs, {START: inputs})
        for name in self._template(node.task_node.reference_id, scope).interface.inputs.variables:
            if name == "err":
                given.literals[name].CopyFrom(error_union(failed.node, failed.error.message))
            elif name not in given.literals:
                given.literals[name].CopyFrom(inputs.literals[name] if name in inputs.literals else void_union())
        self._node(node, given, Scope(scope.prefix, scope.workflows, scope.tasks))

    def _graph(self, nodes: Iterable[graph_pb2.Node], known: dict[str, literals_pb2.LiteralMap], scope: Scope) -> None:
        """Run every node once what it needs is known, side by side where the graph allows it."""
        todo = {node.id: node for node in nodes if node.id not in (START, "end-node")}
        first: NodeFailed | None = None
        with ThreadPoolExecutor(max(1, len(todo))) as pool:
            running: dict[Future, str] = {}
            while True:
                for node in [] if first else [n for n in todo.values() if _needs(n) <= known.keys()]:
                    del todo[node.id]
                    running[pool.submit(self._node, node, bind(node.inputs, known), scope)] = node.id
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(done)
                    try:
                        known[name] = done.result()
                    except NodeFailed as failed:
                        first = first or failed
                        scope.failed.set()
                        self._flyte.tell()
        if first:
            raise first
        assert not todo, f"nodes {sorted(todo)} wait for each other"

    def _node(self, node: graph_pb2.Node, inputs: literals_pb2.LiteralMap, scope: Scope) -> literals_pb2.LiteralMap:
        is_array = node.WhichOneof("target") == "array_node"
        run = NodeRun(path=scope.prefix + node.id, spec_id=node.id, inputs=inputs, is_array=is_array)
        self._execution.nodes[run.path] = run
        try:
            run.outputs = self._target(node, run, scope)
        except NodeFailed as failed:
            run.error, run.phase = failed.error, phases.NodeExecution.FAILED
            raise NodeFailed(failed.error, node.id) from failed
        run.phase = phases.NodeExecution.SUCCEEDED
        return run.outputs

    def _target(self, node: graph_pb2.Node, run: NodeRun, scope: Scope) -> literals_pb2.LiteralMap:
        target = node.WhichOneof("target")
        if target == "task_node":
            return self._task(node, self._template(node.task_node.reference_id, scope), run, scope)
        if target == "workflow_node" and node.workflow_node.HasField("sub_workflow_ref"):
            template = scope.workflows[key_of(node.workflow_node.sub_workflow_ref)]
            return self._workflow(template, run.inputs, scope.inside(run.path))
        if target == "gate_node" and node.gate_node.HasField("signal"):
            return self._gate(node, scope)
        if target == "array_node":
            return self._array(node, run, scope)
        raise NodeFailed(failure("BadSpecification", f"the stand-in has no {target}: see docs/remote-proof.md"))

    def _template(self, identifier: identifier_pb2.Identifier, scope: Scope) -> tasks_pb2.TaskTemplate:
        return scope.tasks.get(key_of(identifier)) or self._flyte.catalog.task(identifier)

    # gates --------------------------------------------------------------------------------------------------------

    def _gate(self, node: graph_pb2.Node, scope: Scope) -> literals_pb2.LiteralMap:
        condition, timeout_s = node.gate_node.signal, node.metadata.timeout.ToTimedelta().total_seconds()
        signal = self._flyte.open_gate(self._execution, condition)
        deadline = self._flyte.clock() + timeout_s
        self._flyte.wait(
            lambda: (
                signal.HasField("value")
                or scope.is_failed
                or self._execution.stop.is_set()
                or (timeout_s and self._flyte.clock() > deadline)
            ),
            timeout_s or None,
        )
        if signal.HasField("value"):
            return literals_pb2.LiteralMap(literals={condition.output_variable_name: signal.value})
        if scope.is_failed or self._execution.stop.is_set():
            raise NodeFailed(failure("NodeAborted", "aborted"))
        raise NodeFailed(_exhausted(_timed_out(timeout_s), attempts=1, most=0))

    # maps ---------------------------------------------------------------------------------------------------------

    def _array(self, node: graph_pb2.Node, run: NodeRun, scope: Scope) -> literals_pb2.LiteralMap:
        array = node.array_node
        template = self._template(array.node.task_node.reference_id, scope)
        bound = set(array.bound_inputs)
        lists = [v for k, v in run.inputs.literals.items() if k not in bound and v.HasField("collection")]
        if not lists:  # a list inside a dataclass is a binary literal, and none to propeller
            raise NodeFailed(failure("InvalidArrayLength", "no input array provided"))
        size = len(lists[0].collection.literals)
        outputs: list[literals_pb2.LiteralMap | None] = [None] * size
        problems: list[str] = []
        with ThreadPoolExecutor(array.parallelism or CORES) as pool:
            items = [pool.submit(self._item, index, array.node, template, run, scope) for index in range(size)]
            for index, item in enumerate(items):
                try:
                    outputs[index] = item.result()
                except NodeFailed as failed:
                    problems.append(f"[{index}]: {failed.error.message}")
        if size - len(problems) < _fewest(array, size):
            raise NodeFailed(failure("", "\n".join(problems)))
        collected = literals_pb2.LiteralMap()
        for name in template.interface.outputs.variables:
            collection = collected.literals[name].collection
            collection.SetInParent()
            collection.literals.extend(NOTHING if each is None else each.literals[name] for each in outputs)
        return collected

    def _item(
        self, index: int, node: graph_pb2.Node, template: tasks_pb2.TaskTemplate, array: NodeRun, scope: Scope
    ) -> literals_pb2.LiteralMap:
        run = NodeRun(path=f"{array.path}-n{index}", spec_id=f"n{index}", inputs=array.inputs)
        self._execution.nodes[run.path] = run
        try:
            run.outputs = self._task(node, template, run, scope, index)
        except NodeFailed as failed:
            run.error, run.phase = failed.error, phases.NodeExecution.FAILED
            raise
        run.phase = phases.NodeExecution.SUCCEEDED
        return run.outputs

    # tasks --------------------------------------------------------------------------------------------------------

    def _task(
        self,
        node: graph_pb2.Node,
        template: tasks_pb2.TaskTemplate,
        run: NodeRun,
        scope: Scope,
        item: int | None = None,
    ) -> literals_pb2.LiteralMap:
        run.task = template.id.name
        retries = node.metadata.retries.retries
        if item is None:  # for an item only the map node's count (flyte#6800)
            retries = retries or template.metadata.retries.retries
        timeout_s = node.metadata.timeout.ToTimedelta().total_seconds() or UNBOUNDED_S
        for number in itertools.count():
            began = time.monotonic()
            if template.type in self._flyte.connectors:
                attempt, status = self._ask_connector(template, run, timeout_s), None
            else:
                attempt, status = self._run_pod(template, run, number, timeout_s, item)
            run.attempts.append((status, time.monotonic() - began))
            if attempt.graph is not None:
                return self._dynamic(attempt.graph, run, scope)
            if attempt.outputs is not None:
                return attempt.outputs
            if not attempt.recoverable:
                raise NodeFailed(attempt.error)
            if number >= retries or self._execution.stop.is_set():
                raise NodeFailed(_exhausted(attempt.error, attempts=number + 1, most=retries + 1 if retries else 0))
        raise AssertionError

    def _dynamic(self, spec: dynamic_job_pb2.DynamicJobSpec, run: NodeRun, scope: Scope) -> literals_pb2.LiteralMap:
        known: dict[str, literals_pb2.LiteralMap] = {}
        inner = scope.inside(
            run.path,
            {key_of(each.id): each for each in spec.subworkflows},
            {key_of(each.id): each for each in spec.tasks},
        )
        self._graph(spec.nodes, known, inner)
        return bind(spec.outputs, known)

    def _ask_connector(self, template: tasks_pb2.TaskTemplate, run: NodeRun, timeout_s: float) -> Attempt:
        where = self._root / run.path
        task = ConnectorTask(self._flyte.connectors[template.type], template, run.inputs, where.as_uri())
        resource = task.run(self._execution.stop, timeout_s)
        if resource.phase == phases.TaskExecution.SUCCEEDED:
            return Attempt(outputs=resource.outputs)
        if resource.phase == phases.TaskExecution.RUNNING:
            return Attempt(error=_timed_out(timeout_s), recoverable=True)
        recoverable = resource.phase == phases.TaskExecution.RETRYABLE_FAILED
        return Attempt(error=failure("ConnectorTask", resource.message), recoverable=recoverable)

    def _run_pod(
        self, template: tasks_pb2.TaskTemplate, run: NodeRun, number: int, timeout_s: float, item: int | None
    ) -> tuple[Attempt, int | None]:
        place = self._root / run.path / str(number)
        work = self._flyte.scratch / f"{self._execution.name}-{run.path}-{number}"
        for directory in (place, work):
            directory.mkdir(parents=True)
        inputs = self._root / run.path / "inputs.pb"
        inputs.write_bytes(run.inputs.SerializeToString())
        previous = (self._root / run.path / str(number - 1) / "checkpoints").as_uri() if number else '""'
        filled = {
            "{{.input}}": str(inputs),
            "{{.outputPrefix}}": str(place),
            "{{.rawOutputDataPrefix}}": str(self._flyte.root / "raw" / self._execution.name / run.path / str(number)),
            "{{.checkpointOutputPrefix}}": (place / "checkpoints").as_uri(),
            "{{.prevCheckpointPrefix}}": previous,
        }
        command = list(_filled([*template.container.command, *template.container.args], filled, work))
        environment = self._environment(template, number, item)
        pod = Pod(command=command, directory=work, environment=environment, log=place / "pod.log")
        status = self._flyte.pods.run(pod, timeout_s)
        return _judge(place, status, timeout_s), status

    def _environment(self, template: tasks_pb2.TaskTemplate, number: int, item: int | None) -> dict[str, str]:
        identifier, task = self._execution.record.id, template.id
        place = {"BATCH_JOB_ARRAY_INDEX_VAR_NAME": "FLYTE_K8S_ARRAY_INDEX", "FLYTE_K8S_ARRAY_INDEX": str(item)}
        return {
            **base_environment(self._flyte.scratch),
            **{each.key: each.value for each in template.container.env},
            "FLYTE_INTERNAL_EXECUTION_ID": identifier.name,
            "FLYTE_INTERNAL_EXECUTION_PROJECT": identifier.project,
            "FLYTE_INTERNAL_EXECUTION_DOMAIN": identifier.domain,
            "FLYTE_INTERNAL_TASK_NAME": task.name,
            "FLYTE_INTERNAL_TASK_VERSION": task.version,
            "FLYTE_INTERNAL_TASK_PROJECT": task.project,
            "FLYTE_INTERNAL_TASK_DOMAIN": task.domain,
            "FLYTE_ATTEMPT_NUMBER": str(number),
            **({} if item is None else place),
            **self._flyte.inject(task.name, number, item),
        }


def _needs(node: graph_pb2.Node) -> set[str]:
    return {name for name in (*node.upstream_node_ids, *promised(node.inputs)) if name != START}


def _fewest(array: graph_pb2.ArrayNode, size: int) -> int:
    """Return how many items must succeed."""
    criterion = array.WhichOneof("success_criteria")
    if criterion == "min_successes":
        return array.min_successes
    return math.ceil(array.min_success_ratio * size - 1e-6) if criterion == "min_success_ratio" else size


def _filled(command: list[str], values: dict[str, str], work: Path) -> Iterator[str]:
    before = ""
    for argument in command:
        for template, value in values.items():
            argument = argument.replace(template, value)
        yield str(work) if before == "--dest-dir" else argument
        before = argument


def _judge(place: Path, status: int | None, timeout_s: float) -> Attempt:
    """Return what an attempt came to from what its pod left behind."""
    if status is None:
        return Attempt(error=_timed_out(timeout_s), recoverable=True)
    errors = sorted(place.glob("error*.pb"))
    if errors:
        found = errors_pb2.ErrorDocument.FromString(errors[0].read_bytes()).error
        recoverable = found.kind == errors_pb2.ContainerError.RECOVERABLE
        return Attempt(error=failure(found.code, found.message, found.origin), recoverable=recoverable)
    if status:
        tail = (place / "pod.log").read_text(errors="replace")[-2000:]
        message = f"pod terminated with exit code ({128 - status if status < 0 else status}). Message: {tail}"
        return Attempt(error=failure("Error", message), recoverable=True)
    if (place / "futures.pb").exists():
        return Attempt(graph=dynamic_job_pb2.DynamicJobSpec.FromString((place / "futures.pb").read_bytes()))
    if (place / "outputs.pb").exists():
        return Attempt(outputs=literals_pb2.LiteralMap.FromString((place / "outputs.pb").read_bytes()))
    return Attempt(error=failure("OutputsNotFound", f"no outputs in {place}", SYSTEM), recoverable=True)


def _timed_out(timeout_s: float) -> phases.ExecutionError:
    return failure("TimeoutExpired", f"task execution timeout [{_go_duration(timeout_s)}] expired")


def _exhausted(error: phases.ExecutionError, *, attempts: int, most: int) -> phases.ExecutionError:
    kind = phases.ExecutionError.ErrorKind.Name(error.kind)
    return failure(
        f"RetriesExhausted|{error.code}",
        f"[{attempts}/{most}] currentAttempt done. Last Error: {kind}::{error.message}",
    )


def _go_duration(seconds: float) -> str:
    """Return a duration as Go prints it."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"

"""What was registered: tasks, workflows and launch plans, under the rules of flyteadmin 1.16.

the same again              ALREADY_EXISTS
another under the name      INVALID_ARGUMENT: a version is for ever
refers to what is not there NOT_FOUND
unknown project or domain   INVALID_ARGUMENT
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import grpc
from flyteidl.admin import launch_plan_pb2, task_pb2, workflow_pb2
from flyteidl.core import compiler_pb2, identifier_pb2, tasks_pb2
from flyteidl.core import workflow_pb2 as graph_pb2

Key = tuple[int, str, str, str, str]
KINDS = {identifier_pb2.TASK: "task", identifier_pb2.WORKFLOW: "workflow", identifier_pb2.LAUNCH_PLAN: "launch plan"}


class Refused(Exception):
    """What admin answers in place of a result: a status code, and its words."""

    def __init__(self, code: grpc.StatusCode, details: str):
        super().__init__(details)
        self.code = code


def key_of(identifier: identifier_pb2.Identifier) -> Key:
    """Return an identifier as a dictionary's key."""
    return (
        identifier.resource_type,
        identifier.project,
        identifier.domain,
        identifier.name,
        identifier.version,
    )


class Catalog:
    """All entities of some projects.

    Args:
        project: the one that exists.
        domains: its domains.
    """

    def __init__(self, project: str, domains: Iterable[str]):
        self._places = {(project, domain) for domain in domains}
        self._entities: dict[Key, object] = {}
        self._active: dict[tuple[str, str, str], str] = {}
        self._lock = threading.Lock()

    def check_place(self, project: str, domain: str) -> None:
        """Refuse a project and domain that do not exist."""
        if (project, domain) not in self._places:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"failed to validate that project [{project}] and domain [{domain}] are registered",
            )

    def add(self, request: object) -> None:
        """Register what a Create… request holds."""
        kind = KINDS[request.id.resource_type]
        self.check_place(request.id.project, request.id.domain)
        for needed in _references(request.spec):
            self.get(needed)
        with self._lock:
            known = self._entities.setdefault(key_of(request.id), request)
        if known is request:
            return
        if _structure(known.spec) == _structure(request.spec):
            raise Refused(
                grpc.StatusCode.ALREADY_EXISTS, f"{kind} with identical structure already exists: {request.id.name}"
            )
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{kind} with different structure already exists: {request.id.name} version {request.id.version}",
        )

    def get(self, identifier: identifier_pb2.Identifier):
        """Return a registered request."""
        found = self._entities.get(key_of(identifier))
        if found is None:
            kind = KINDS.get(identifier.resource_type, "entity")
            raise Refused(grpc.StatusCode.NOT_FOUND, f"missing {kind} {identifier.name} version {identifier.version}")
        return found

    def named(self, kind: int, place: identifier_pb2.Identifier) -> list:
        """Return the versions of a kind in a project and domain, of one name if it is given, the newest first."""
        wanted = (kind, place.project, place.domain)
        found = [each for key, each in self._entities.items() if key[:3] == wanted and place.name in ("", key[3])]
        return found[::-1]

    def with_decks(self) -> set[str]:
        """Return the names of the tasks that promise a deck."""
        tasks = [each.spec.template for key, each in self._entities.items() if key[0] == identifier_pb2.TASK]
        return {task.id.name for task in tasks if task.metadata.generates_deck.value}

    def activate(self, identifier: identifier_pb2.Identifier, state: int) -> None:
        """Switch a version of a launch plan on, in place of another one, or off."""
        self.get(identifier)
        name = (identifier.project, identifier.domain, identifier.name)
        if state == launch_plan_pb2.ACTIVE:
            self._active[name] = identifier.version
        elif self._active.get(name) == identifier.version:
            del self._active[name]

    def active_plan(self, place: identifier_pb2.Identifier) -> launch_plan_pb2.LaunchPlan:
        """Return the active version of a launch plan."""
        version = self._active.get((place.project, place.domain, place.name))
        if version is None:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"No active launch plan could be found: {place.name}")
        identifier = identifier_pb2.Identifier(
            resource_type=identifier_pb2.LAUNCH_PLAN,
            project=place.project,
            domain=place.domain,
            name=place.name,
            version=version,
        )
        return self.plan(identifier)

    def plan(self, identifier: identifier_pb2.Identifier) -> launch_plan_pb2.LaunchPlan:
        """Return a launch plan with what its execution expects: the inputs that it does not fix."""
        found = self.get(identifier)
        state = self._active.get((identifier.project, identifier.domain, identifier.name)) == identifier.version
        expected = dict(found.spec.default_inputs.parameters.items())
        closure = launch_plan_pb2.LaunchPlanClosure(state=launch_plan_pb2.ACTIVE if state else launch_plan_pb2.INACTIVE)
        for name, parameter in expected.items():
            if name not in found.spec.fixed_inputs.literals:
                closure.expected_inputs.parameters[name].CopyFrom(parameter)
        return launch_plan_pb2.LaunchPlan(id=found.id, spec=found.spec, closure=closure)

    def task(self, identifier: identifier_pb2.Identifier) -> tasks_pb2.TaskTemplate:
        """Return a task's template."""
        found = self.get(identifier)
        template = tasks_pb2.TaskTemplate()
        template.CopyFrom(found.spec.template)
        template.id.CopyFrom(found.id)
        return template

    def compiled_task(self, identifier: identifier_pb2.Identifier) -> task_pb2.Task:
        """Return a task as admin shows it."""
        compiled = compiler_pb2.CompiledTask(template=self.task(identifier))
        return task_pb2.Task(id=identifier, closure=task_pb2.TaskClosure(compiled_task=compiled))

    def compiled_workflow(self, identifier: identifier_pb2.Identifier) -> workflow_pb2.Workflow:
        """Return a workflow as admin shows it, with the tasks that it uses."""
        found = self.get(identifier)
        primary = graph_pb2.WorkflowTemplate()
        primary.CopyFrom(found.spec.template)
        primary.id.CopyFrom(found.id)
        used = {key_of(each): each for each in _references(found.spec) if each.resource_type == identifier_pb2.TASK}
        closure = compiler_pb2.CompiledWorkflowClosure(
            primary=compiler_pb2.CompiledWorkflow(template=primary),
            sub_workflows=[compiler_pb2.CompiledWorkflow(template=each) for each in found.spec.sub_workflows],
            tasks=[compiler_pb2.CompiledTask(template=self.task(each)) for each in used.values()],
        )
        return workflow_pb2.Workflow(id=found.id, closure=workflow_pb2.WorkflowClosure(compiled_workflow=closure))


def _references(spec: object) -> Iterator[identifier_pb2.Identifier]:
    """Yield what must be registered before this."""
    if isinstance(spec, launch_plan_pb2.LaunchPlanSpec):
        yield spec.workflow_id
    elif isinstance(spec, workflow_pb2.WorkflowSpec):
        for template in (spec.template, *spec.sub_workflows):
            for node in (*template.nodes, template.failure_node):
                yield from _tasks_of(node)


def _tasks_of(node: graph_pb2.Node) -> Iterator[identifier_pb2.Identifier]:
    if node.WhichOneof("target") == "task_node":
        yield node.task_node.reference_id
    elif node.WhichOneof("target") == "array_node":
        yield from _tasks_of(node.array_node.node)


def _structure(spec: object) -> bytes:
    """Return what must be equal: all but the order of upstream nodes, for flytekit takes it from a set."""
    plain = type(spec)()
    plain.CopyFrom(spec)
    if isinstance(plain, workflow_pb2.WorkflowSpec):
        for template in (plain.template, *plain.sub_workflows):
            for node in template.nodes:
                node.upstream_node_ids[:] = sorted(node.upstream_node_ids)
    return plain.SerializeToString(deterministic=True)

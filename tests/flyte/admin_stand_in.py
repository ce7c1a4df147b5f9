"""A stand-in for FlyteAdmin, in this process: flyteidl's real gRPC services, as far as trigger and approvals use them.

What is real: the wire, flytekit's client with its retries and interceptors, the protobufs, the status codes. What is
not: nothing runs, nothing is stored beyond this process, there is no authentication and one project and domain only.
What it does of admin's part follows flyteadmin 1.16 (`execution_manager.go`, `execution_validator.go`,
`signal_manager.go`, `signal_validator.go`), as read:

    GetActiveLaunchPlan   NOT_FOUND without an active version
    CreateExecution       INVALID_ARGUMENT for a bad name; NOT_FOUND for a plan that is not there; ALREADY_EXISTS for a
                          name that is taken, and also when the plan's concurrency policy skips the launch
    GetExecution          NOT_FOUND for a name that is not there
    ListExecutions        those whose phase the filter names, by pages
    ListSignals           the gates that an execution reached; no value while they wait; none for an unknown execution
    SetSignal             INVALID_ARGUMENT for a gate that was not reached, or a value that is no string; a second value
                          replaces the first
    ListProjects, GetDomains, ListLaunchPlans, GetVersion   its one project and domain; active plans; a constant
    GetWorkflow           one task, with what `requests` says
    GetProjectDomainAttributes   NOT_FOUND where none are set
    everything else       UNIMPLEMENTED
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from concurrent import futures

import grpc
from flyteidl.admin import (
    execution_pb2,
    launch_plan_pb2,
    project_domain_attributes_pb2,
    project_pb2,
    signal_pb2,
    version_pb2,
    workflow_pb2,
)
from flyteidl.admin import matchable_resource_pb2 as matchable
from flyteidl.core import compiler_pb2, identifier_pb2, literals_pb2, security_pb2, tasks_pb2, types_pb2
from flyteidl.core import execution_pb2 as phases
from flyteidl.service import admin_pb2_grpc, signal_pb2_grpc

NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
PROJECT, DOMAIN, VERSION = "fednested", "development", "v1"


class AdminStandIn(admin_pb2_grpc.AdminServiceServicer, signal_pb2_grpc.SignalServiceServicer):
    """One FlyteAdmin with the given active launch plans.

    Attributes:
        executions: name → execution, as admitted.
        admitted: names in the order of their admission; a name twice would be an execution twice.
        busy: launch plans whose concurrency policy skips every launch now.
        vanishing: launch plans are taken away once CreateExecution is called.
        lose_answers: how many admitted CreateExecutions and SetSignals are answered UNAVAILABLE.
        delay_s: how long CreateExecution takes, before and after the admission each.
        account: Kubernetes service account of the launch plans; "" is none.
        requests: what the plans' workflow's one task asks for.
        attributes: kind → matching attributes of the project and domain.
        signals: (execution, gate) → signal, as propeller creates it when the gate begins to wait.
        calls: RPC → how often.
    """

    def __init__(self, plans: tuple[str, ...] = ("nested_round_fast", "nested_round_nightly")):
        self.plans = set(plans)
        self.executions: dict[str, execution_pb2.Execution] = {}
        self.admitted: list[str] = []
        self.busy: set[str] = set()
        self.vanishing = False
        self.lose_answers = 0
        self.delay_s = 0.0
        self.account = "fednested"
        self.requests = {"cpu": "4", "memory": "8Gi", "gpu": "8"}
        self.attributes: dict[int, matchable.MatchingAttributes] = {}
        self.signals: dict[tuple[str, str], signal_pb2.Signal] = {}
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> AdminStandIn:
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, self._server)
        signal_pb2_grpc.add_SignalServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    @property
    def environment(self) -> dict[str, str]:
        """What points flytekit here."""
        return {"FLYTE_PLATFORM_URL": f"127.0.0.1:{self.port}", "FLYTE_PLATFORM_INSECURE": "true"}

    def GetActiveLaunchPlan(self, request, context):
        self.calls["GetActiveLaunchPlan"] += 1
        if request.id.name not in self.plans:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no active launch plan {request.id.name}")
        return self._plan(request.id.name)

    def _plan(self, name: str) -> launch_plan_pb2.LaunchPlan:
        blob = literals_pb2.Blob(uri="s3://acme/tier1.yaml")
        config = literals_pb2.Literal(scalar=literals_pb2.Scalar(blob=blob))
        spec = launch_plan_pb2.LaunchPlanSpec(
            workflow_id=_id(identifier_pb2.WORKFLOW, "workflow"),
            fixed_inputs=literals_pb2.LiteralMap(literals={"config": config}),
            security_context=security_pb2.SecurityContext(
                run_as=security_pb2.Identity(k8s_service_account=self.account)
            ),
        )
        return launch_plan_pb2.LaunchPlan(id=_id(identifier_pb2.LAUNCH_PLAN, name), spec=spec)

    def GetWorkflow(self, request, context):
        self.calls["GetWorkflow"] += 1
        kinds = tasks_pb2.Resources.ResourceName
        requests = [
            tasks_pb2.Resources.ResourceEntry(name=kinds.Value(name.upper()), value=value)
            for name, value in self.requests.items()
        ]
        container = tasks_pb2.Container(resources=tasks_pb2.Resources(requests=requests))
        template = tasks_pb2.TaskTemplate(id=_id(identifier_pb2.TASK, "tasks.gpu.train.large"), container=container)
        compiled = compiler_pb2.CompiledWorkflowClosure(tasks=[compiler_pb2.CompiledTask(template=template)])
        return workflow_pb2.Workflow(id=request.id, closure=workflow_pb2.WorkflowClosure(compiled_workflow=compiled))

    def GetProjectDomainAttributes(self, request, context):
        self.calls["GetProjectDomainAttributes"] += 1
        if request.resource_type not in self.attributes:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no attributes of {request.project} {request.domain}")
        found = project_domain_attributes_pb2.ProjectDomainAttributes(
            project=request.project,
            domain=request.domain,
            matching_attributes=self.attributes[request.resource_type],
        )
        return project_domain_attributes_pb2.ProjectDomainAttributesGetResponse(attributes=found)

    def ListProjects(self, request, context):
        self.calls["ListProjects"] += 1
        return project_pb2.Projects(projects=[project_pb2.Project(id=PROJECT, name=PROJECT)])

    def GetDomains(self, request, context):
        self.calls["GetDomains"] += 1
        return project_pb2.GetDomainsResponse(domains=[project_pb2.Domain(id=DOMAIN, name=DOMAIN)])

    def ListLaunchPlans(self, request, context):
        self.calls["ListLaunchPlans"] += 1
        found = [request.id.name] if request.id.name in self.plans else []
        return launch_plan_pb2.LaunchPlanList(launch_plans=[self._plan(name) for name in found])

    def GetVersion(self, request, context):
        self.calls["GetVersion"] += 1
        return version_pb2.GetVersionResponse(control_plane_version=version_pb2.Version(Version="stand-in"))

    def CreateExecution(self, request, context):
        self.calls["CreateExecution"] += 1
        time.sleep(self.delay_s)
        if not NAME.fullmatch(request.name):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"invalid execution name {request.name}")
        plan = request.spec.launch_plan.name
        if self.vanishing:
            self.plans.clear()
        if plan not in self.plans:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no launch plan {plan}")
        with self._lock:
            taken = request.name in self.executions
            if not taken and plan not in self.busy:
                self._admit(request)
        if taken or plan in self.busy:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{request.name} exists, or {plan} is at its limit")
        time.sleep(self.delay_s)
        self._lose_answer(context)
        return execution_pb2.ExecutionCreateResponse(id=self.executions[request.name].id)

    def GetExecution(self, request, context):
        self.calls["GetExecution"] += 1
        if request.id.name not in self.executions:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no execution {request.id.name}")
        return self.executions[request.id.name]

    def ListExecutions(self, request, context):
        self.calls["ListExecutions"] += 1
        phase = re.fullmatch(r"eq\(phase,(\w+)\)", request.filters)[1]
        wanted = phases.WorkflowExecution.Phase.Value(phase)
        found = [each for _, each in sorted(self.executions.items()) if each.closure.phase == wanted]
        start = int(request.token or 0)
        end = start + request.limit
        return execution_pb2.ExecutionList(executions=found[start:end], token=str(end) if end < len(found) else "")

    def ListSignals(self, request, context):
        self.calls["ListSignals"] += 1
        name = request.workflow_execution_id.name
        return signal_pb2.SignalList(signals=[each for key, each in sorted(self.signals.items()) if key[0] == name])

    def SetSignal(self, request, context):
        self.calls["SetSignal"] += 1
        signal = self.signals.get((request.id.execution_id.name, request.id.signal_id))
        if signal is None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"failed to validate that signal {request.id} exists")
        if request.value.scalar.primitive.WhichOneof("value") != "string_value":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"value is not castable to type {signal.type}")
        signal.value.CopyFrom(request.value)
        self._lose_answer(context)
        return signal_pb2.SignalSetResponse()

    def reach_gate(self, execution: str, gate: str) -> None:
        """Play propeller: the execution runs, and its gate begins to wait for a string."""
        self.run(execution)
        identifier = identifier_pb2.SignalIdentifier(execution_id=self.executions[execution].id, signal_id=gate)
        kind = types_pb2.LiteralType(simple=types_pb2.STRING)
        self.signals[execution, gate] = signal_pb2.Signal(id=identifier, type=kind)

    def run(self, execution: str, phase: str = "RUNNING") -> None:
        """Play propeller: an execution is in this phase."""
        identifier = identifier_pb2.WorkflowExecutionIdentifier(project=PROJECT, domain=DOMAIN, name=execution)
        closure = execution_pb2.ExecutionClosure(
            workflow_id=_id(identifier_pb2.WORKFLOW, "workflow"), phase=phases.WorkflowExecution.Phase.Value(phase)
        )
        self.executions[execution] = execution_pb2.Execution(id=identifier, closure=closure)

    def _lose_answer(self, context: grpc.ServicerContext) -> None:
        if self.lose_answers > 0:
            self.lose_answers -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "the answer was lost")

    def _admit(self, request: execution_pb2.ExecutionCreateRequest) -> None:
        name = identifier_pb2.WorkflowExecutionIdentifier(
            project=request.project, domain=request.domain, name=request.name
        )
        closure = execution_pb2.ExecutionClosure(workflow_id=_id(identifier_pb2.WORKFLOW, "workflow"))
        self.executions[request.name] = execution_pb2.Execution(id=name, spec=request.spec, closure=closure)
        self.admitted.append(request.name)


def _id(kind: int, name: str) -> identifier_pb2.Identifier:
    return identifier_pb2.Identifier(resource_type=kind, project=PROJECT, domain=DOMAIN, name=name, version=VERSION)

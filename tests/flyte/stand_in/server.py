"""FlyteAdmin, DataProxy and Signal over gRPC; what a client asks for runs here (see the package's docstring)."""

from __future__ import annotations

import base64
import functools
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent import futures
from datetime import timedelta
from pathlib import Path

import grpc
from flyteidl.admin import (
    execution_pb2,
    launch_plan_pb2,
    node_execution_pb2,
    signal_pb2,
    task_execution_pb2,
    task_pb2,
    version_pb2,
    workflow_pb2,
)
from flyteidl.core import identifier_pb2
from flyteidl.core import workflow_pb2 as graph_pb2
from flyteidl.service import admin_pb2_grpc, dataproxy_pb2, dataproxy_pb2_grpc, signal_pb2_grpc

from tests.flyte.admin_stand_in import DOMAIN, NAME, PROJECT, AdminStandIn
from tests.flyte.stand_in.catalog import Catalog, Refused
from tests.flyte.stand_in.executions import Execution, admitted, inputs_of, node_execution, now
from tests.flyte.stand_in.pods import Pods
from tests.flyte.stand_in.propeller import Propeller
from tests.flyte.stand_in.store import Store

SERVICE = "flyteidl.service."
FAILURE_NODE = "fn0"  # flytekit cannot place it in the workflow it fetches
PATIENCE_S = 240.0
# flytekit's client pings every half minute, calls or not; gRPC's default answers that with GOAWAY.
PINGS = [("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.min_ping_interval_without_data_ms", 10_000)]


def answering(method: Callable) -> Callable:
    """Turn `Refused` into the status code that it names."""

    @functools.wraps(method)
    def answer(self, request, context):
        try:
            return method(self, request, context)
        except Refused as refused:
            context.abort(refused.code, str(refused))

    return answer


class _Recorder(grpc.ServerInterceptor):
    def __init__(self, rpcs: Counter):
        self._rpcs = rpcs

    def intercept_service(self, continuation, details):
        self._rpcs[details.method.removeprefix("/" + SERVICE)] += 1
        return continuation(details)


class FlyteStandIn(AdminStandIn, dataproxy_pb2_grpc.DataProxyServiceServicer):
    """One Flyte with one project, empty at first.

    Args:
        root: directory of everything it stores.
        pods: runs the containers.
        connectors: task type → host:port of the service that serves it.

    Attributes:
        rpcs: `Service/Method` → how often it was called.
        runs: name → execution.
        inject: returns what the environment of a task's attempt has besides: (name of the task, attempt, item of a
            mapped task or None) → variables.
        decks: names of the tasks whose decks somebody has looked at.
    """

    def __init__(
        self,
        root: Path,
        *,
        pods: Pods,
        connectors: Mapping[str, str] | None = None,
    ):
        super().__init__(plans=())
        self.root, self.pods, self.scratch = root / "store", pods, root / "pods"
        self.connectors = dict(connectors or {})
        self.catalog = Catalog(PROJECT, (DOMAIN, "staging", "production"))
        self.runs: dict[str, Execution] = {}
        self.rpcs: Counter[str] = Counter()
        self.inject: Callable[[str, int, int | None], Mapping[str, str]] = lambda task, attempt, item: {}
        self.decks: set[str] = set()
        self._changed = threading.Condition()
        self._ahead_s = 0.0
        for directory in (self.root, self.scratch):
            directory.mkdir(parents=True)

    def __enter__(self) -> FlyteStandIn:
        self.store = Store(self.root)
        self._server = grpc.server(futures.ThreadPoolExecutor(8), interceptors=[_Recorder(self.rpcs)], options=PINGS)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, self._server)
        dataproxy_pb2_grpc.add_DataProxyServiceServicer_to_server(self, self._server)
        signal_pb2_grpc.add_SignalServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        for execution in self.runs.values():
            execution.stop.set()
        self.tell()
        for execution in self.runs.values():
            execution.thread.join(PATIENCE_S)
        self._server.stop(None).wait()
        self.store.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    # what tests and propeller do ----------------------------------------------------------------------------------

    def clock(self) -> float:
        """Return the seconds that time-outs of gates are measured with."""
        return time.monotonic() + self._ahead_s

    def pass_time(self, span: timedelta) -> None:
        """Let gates believe that time has passed."""
        self._ahead_s += span.total_seconds()
        self.tell()

    def tell(self) -> None:
        """Wake up who waits: something has changed."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, condition: Callable[[], object], timeout_s: float | None = None) -> bool:
        """Wait until a condition holds that only changes with a `tell`; return whether it does."""
        with self._changed:
            return bool(self._changed.wait_for(condition, timeout_s))

    def wait_for_end(self, execution: str) -> Execution:
        """Wait until an execution is over, and return it."""
        assert self.wait(lambda: execution in self.runs and self.runs[execution].is_over, PATIENCE_S), execution
        return self.runs[execution]

    def open_gate(self, execution: Execution, condition: graph_pb2.SignalCondition) -> signal_pb2.Signal:
        """Create the signal of a gate that begins to wait."""
        identifier = identifier_pb2.SignalIdentifier(signal_id=condition.signal_id, execution_id=execution.record.id)
        signal = signal_pb2.Signal(id=identifier, type=condition.type)
        signal = self.signals.setdefault((execution.name, condition.signal_id), signal)
        self.tell()
        return signal

    # registration -------------------------------------------------------------------------------------------------

    @answering
    def CreateTask(self, request, context):
        self.catalog.add(request)
        return task_pb2.TaskCreateResponse()

    @answering
    def CreateWorkflow(self, request, context):
        self.catalog.add(request)
        return workflow_pb2.WorkflowCreateResponse()

    @answering
    def CreateLaunchPlan(self, request, context):
        self.catalog.add(request)
        return launch_plan_pb2.LaunchPlanCreateResponse()

    @answering
    def GetTask(self, request, context):
        return self.catalog.compiled_task(request.id)

    @answering
    def GetWorkflow(self, request, context):
        return self.catalog.compiled_workflow(request.id)

    @answering
    def GetLaunchPlan(self, request, context):
        return self.catalog.plan(request.id)

    @answering
    def GetActiveLaunchPlan(self, request, context):
        return self.catalog.active_plan(request.id)

    @answering
    def UpdateLaunchPlan(self, request, context):
        self.catalog.activate(request.id, request.state)
        return launch_plan_pb2.LaunchPlanUpdateResponse()

    def ListLaunchPlans(self, request, context):
        found = self.catalog.named(identifier_pb2.LAUNCH_PLAN, request.id)
        return launch_plan_pb2.LaunchPlanList(launch_plans=[self.catalog.plan(each.id) for each in found])

    def ListWorkflows(self, request, context):
        found = self.catalog.named(identifier_pb2.WORKFLOW, request.id)
        return workflow_pb2.WorkflowList(workflows=[workflow_pb2.Workflow(id=each.id) for each in found])

    def GetVersion(self, request, context):
        return version_pb2.GetVersionResponse(control_plane_version=version_pb2.Version(Version="v1.16.8"))

    # data proxy ---------------------------------------------------------------------------------------------------

    @answering
    def CreateUploadLocation(self, request, context):
        self.catalog.check_place(request.project, request.domain)
        digest = base64.b16encode(request.content_md5).decode().lower() or uuid.uuid4().hex
        folder = request.filename_root or digest
        path = f"uploads/{request.project}/{request.domain}/{folder}/{request.filename or 'data'}"
        return dataproxy_pb2.CreateUploadLocationResponse(
            signed_url=self.store.signed("PUT", path), native_url=self.store.native(path), expires_at=now()
        )

    @answering
    def CreateDownloadLink(self, request, context):
        node = request.node_execution_id
        found = sorted((self.root / "metadata" / node.execution_id.name / node.node_id).glob("*/deck.html"))
        if not found:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"no deck of node {node.node_id}")
        link = self.store.signed("GET", str(found[-1].relative_to(self.root)))
        urls = dataproxy_pb2.PreSignedURLs(signed_url=[link], expires_at=now())
        return dataproxy_pb2.CreateDownloadLinkResponse(signed_url=[link], pre_signed_urls=urls)

    # executions ---------------------------------------------------------------------------------------------------

    @answering
    def CreateExecution(self, request, context):
        self.catalog.check_place(request.project, request.domain)
        name = request.name or f"f{uuid.uuid4().hex[:19]}"
        if not NAME.fullmatch(name):
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"invalid execution name {name}")
        plan = self.catalog.plan(request.spec.launch_plan)
        interface = self.catalog.get(plan.spec.workflow_id).spec.template.interface
        given = request.inputs if request.HasField("inputs") else request.spec.inputs
        inputs = inputs_of(plan, interface, given)
        with self._changed:
            if name in self.runs:
                raise Refused(grpc.StatusCode.ALREADY_EXISTS, f"execution {name} already exists")
            self._check_limit(plan)
            execution = Execution(record=admitted(request, plan.spec.workflow_id, name), inputs=inputs)
            self.runs[name], self.executions[name] = execution, execution.record
            self.admitted.append(name)
        execution.thread = threading.Thread(target=Propeller(self, execution).run, daemon=True)
        execution.thread.start()
        return execution_pb2.ExecutionCreateResponse(id=execution.record.id)

    def _check_limit(self, plan: launch_plan_pb2.LaunchPlan) -> None:
        most = plan.spec.concurrency_policy.max
        going = [
            run.name
            for run in self.runs.values()
            if not run.is_over and run.record.spec.launch_plan.name == plan.id.name
        ]
        if most and len(going) >= most:
            raise Refused(
                grpc.StatusCode.ALREADY_EXISTS,
                f"Concurrency limit ({most}) reached for launch plan {plan.id.name}. Skipping execution.",
            )

    def GetExecutionData(self, request, context):
        execution = self._execution(request.id.name, context)
        return execution_pb2.WorkflowExecutionGetDataResponse(
            full_inputs=execution.inputs, full_outputs=execution.outputs
        )

    def TerminateExecution(self, request, context):
        self._execution(request.id.name, context).stop.set()
        self.tell()
        return execution_pb2.ExecutionTerminateResponse()

    def ListNodeExecutions(self, request, context):
        execution = self._execution(request.workflow_execution_id.name, context)
        top = [
            node for node in list(execution.nodes.values()) if node.path == node.spec_id and node.path != FAILURE_NODE
        ]
        found = [] if request.unique_parent_id else top
        return node_execution_pb2.NodeExecutionList(node_executions=[node_execution(execution, n) for n in found])

    def GetNodeExecutionData(self, request, context):
        node = self._execution(request.id.execution_id.name, context).nodes.get(request.id.node_id)
        if node is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no node {request.id.node_id}")
        return node_execution_pb2.NodeExecutionGetDataResponse(full_inputs=node.inputs, full_outputs=node.outputs)

    def ListTaskExecutions(self, request, context):
        return task_execution_pb2.TaskExecutionList()

    def SetSignal(self, request, context):
        answer = super().SetSignal(request, context)
        self.tell()
        return answer

    def _execution(self, name: str, context: grpc.ServicerContext) -> Execution:
        if name not in self.runs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no execution {name}")
        return self.runs[name]

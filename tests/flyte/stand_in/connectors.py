"""Propeller's side of a connector task: create until it is accepted, look until it is done; its meta is all state.

A connector that is away is asked again, as propeller does it; a killed one comes back to the same meta.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import grpc
from flyteidl.admin.agent_pb2 import CreateTaskRequest, DeleteTaskRequest, GetTaskRequest, Resource, TaskCategory
from flyteidl.core import literals_pb2, tasks_pb2
from flyteidl.core.execution_pb2 import TaskExecution
from flyteidl.service.agent_pb2_grpc import AsyncAgentServiceStub

BETWEEN_LOOKS_S = 0.2
CALL_S = 10.0  # what propeller gives a call


@dataclass(frozen=True)
class ConnectorTask:
    """One attempt of one task at one connector service.

    Args:
        endpoint: host:port of the service.
        template: the registered task.
        inputs: its inputs.
        output_prefix: where outputs may go.
    """

    endpoint: str
    template: tasks_pb2.TaskTemplate
    inputs: literals_pb2.LiteralMap
    output_prefix: str

    def run(self, stop: threading.Event, deadline_s: float) -> Resource:
        """Return the last resource; one that is still RUNNING means that the time was over or `stop` was set."""
        quick = [(f"grpc.{which}_reconnect_backoff_ms", 50) for which in ("initial", "min", "max")]
        category = TaskCategory(name=self.template.type, version=self.template.task_type_version)
        create = CreateTaskRequest(template=self.template, inputs=self.inputs, output_prefix=self.output_prefix)
        resource = Resource(phase=TaskExecution.RUNNING)
        looks = int(deadline_s / BETWEEN_LOOKS_S) + 1
        with grpc.insecure_channel(self.endpoint, options=quick) as channel:
            stub, meta = AsyncAgentServiceStub(channel), None
            for _ in range(looks):
                if meta is None:
                    answer = _ask(stub.CreateTask, create)
                    meta = answer and answer.resource_meta
                else:
                    answer = _ask(stub.GetTask, GetTaskRequest(task_category=category, resource_meta=meta))
                    resource = answer.resource if answer else resource
                    if resource.phase != TaskExecution.RUNNING:
                        return resource
                if stop.wait(BETWEEN_LOOKS_S):
                    break
            if meta is not None:
                _ask(stub.DeleteTask, DeleteTaskRequest(task_category=category, resource_meta=meta))
        return resource


def _ask(call, request):
    """Return the answer, None while the service is away."""
    try:
        return call(request, timeout=CALL_S)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return None
        raise RuntimeError(error.details()) from error

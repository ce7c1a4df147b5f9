"""The typed sensor: a connector task that waits for a window and returns its cut.

    open_window(config) → Window  ──  kafka_window(window) → TakenCut  ──  keep_cut(config, cut) → CutRef

The resource meta is the window itself, so the connector may be killed and restarted at any time: the next `get` of any
process gives the same answer or a larger cut. Served by `make serve-connector`; in a local run the same class is polled
once a second in the process of the run.

    log answers, window open        RUNNING             how far it is
    log answers, window closed      SUCCEEDED           the cut, empty when nothing arrived in time
    no log, or no topic, at first   RETRYABLE_FAILED    the task's retries apply
    log does not answer any more    RUNNING until T, then RETRYABLE_FAILED: the task's retries apply
    log lost or re-used offsets     FAILED              a person has to look
"""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta

from flyteidl.core.execution_pb2 import TaskExecution
from flytekit import FlyteContextManager
from flytekit.core.base_task import PythonTask, TaskMetadata
from flytekit.core.interface import Interface
from flytekit.core.type_engine import TypeEngine
from flytekit.extend.backend.base_connector import (
    AsyncConnectorBase,
    AsyncConnectorExecutorMixin,
    ConnectorRegistry,
    Resource,
    ResourceMeta,
)
from flytekit.models.literals import LiteralMap

from fednested_lib.errors import FednestedError, TransportError
from tasks.sensors.update_log import connected
from tier1.loops.records import TakenCut, Window

TASK_TYPE = "fednested_kafka_window"
LONGEST = timedelta(days=8)  # window.max_wait_s is at most seven


@dataclass
class WindowMeta(ResourceMeta):
    """All state of one waiting task: its window, and what was wrong with the log when the window was taken on."""

    window: Window
    trouble: str = ""


class KafkaWindowConnector(AsyncConnectorBase):
    """Looks at windows for Flyte's propeller, and keeps nothing between two looks."""

    name = "fednested Kafka window"

    def __init__(self):
        super().__init__(task_type_name=TASK_TYPE, metadata_type=WindowMeta)

    async def create(self, inputs: LiteralMap | None = None, **_: object) -> WindowMeta:
        """Look for broker and topic at once, not only after T.

        What is wrong goes into the meta: an error raised here would reach the console as a traceback.
        """
        context = FlyteContextManager.current_context()
        window = (await TypeEngine._literal_map_to_kwargs(context, inputs, {"window": Window}))["window"]
        return WindowMeta(window=window, trouble=await asyncio.to_thread(_trouble, window))

    def get(self, resource_meta: WindowMeta, **_: object) -> Resource:
        """Look once; flytekit calls this in a thread."""
        from tier1.loops.window import cut_window, look

        if resource_meta.trouble:
            return Resource(phase=TaskExecution.RETRYABLE_FAILED, message=resource_meta.trouble)
        window, now = resource_meta.window, time.time()
        try:
            with connected(window) as log:
                seen = look(log, window, now=now)
                if not seen.closed_by:
                    return Resource(phase=TaskExecution.RUNNING, message=str(seen))
                cut = cut_window(log, seen)
        except TransportError as error:
            late = now - window.opened_at >= window.max_wait_s
            return Resource(phase=TaskExecution.RETRYABLE_FAILED if late else TaskExecution.RUNNING, message=str(error))
        except FednestedError as error:
            return Resource(phase=TaskExecution.FAILED, message=str(error))
        return Resource(phase=TaskExecution.SUCCEEDED, message=str(seen), outputs={"o0": cut})

    async def delete(self, resource_meta: WindowMeta, **_: object) -> None:
        """An aborted execution leaves nothing behind."""


def _trouble(window: Window) -> str:
    """Return what is wrong with the log of a window, or nothing."""
    try:
        with connected(window) as log:
            log.watermarks(window.topic)
    except FednestedError as error:
        return str(error)
    return ""


class KafkaWindow(AsyncConnectorExecutorMixin, PythonTask):
    """Task `(window: Window) -> TakenCut` that runs in the connector service."""

    def __init__(self, name: str, *, timeout: timedelta = LONGEST, retries: int = 3):
        super().__init__(
            task_type=TASK_TYPE,
            name=name,
            task_config=None,
            interface=Interface(inputs=OrderedDict(window=Window), outputs=OrderedDict(o0=TakenCut)),
            metadata=TaskMetadata(timeout=timeout, retries=retries),
        )


ConnectorRegistry.register(KafkaWindowConnector())
kafka_window = KafkaWindow(name="tasks.sensors.kafka_window.kafka_window")

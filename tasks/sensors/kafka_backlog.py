"""The plain sensor: Flyte's own `BaseSensor`, which waits for the same window and returns nothing.

    open_window(config) → Window  ──  kafka_backlog(window)  ──  aggregate_experts(config)

Its task type is Flyte's `sensor`, so a connector service that an operator already has can serve it, with this
repository and confluent-kafka in its image; no task type of ours needs to be enabled. What closed the window is cut
afterwards, by `take_cut`. Without any connector service `take_cut` alone waits, in a pod of its own.
"""

import asyncio
import time
from dataclasses import asdict
from datetime import timedelta

from flytekit.sensor.base_sensor import BaseSensor

from fednested_lib.errors import TransportError
from tasks.sensors.update_log import connected
from tier1.loops.records import Window


class KafkaBacklog(BaseSensor):
    """Task `(window: Window) -> None`; Flyte's sensor engine makes one anew for every look, hence `config`."""

    def __init__(self, name: str, *, timeout: timedelta = timedelta(days=8), config: dict | None = None):
        super().__init__(name=name, timeout=timeout)

    async def poke(self, window: Window) -> bool:
        """Look once: has the window closed?"""
        # The engine hands over what is left of the window: a dictionary, or a class that it made from the schema.
        window = Window(**(window if isinstance(window, dict) else asdict(window)))
        return await asyncio.to_thread(_closed, window)


def _closed(window: Window) -> bool:
    from tier1.loops.window import look

    now = time.time()
    try:
        with connected(window) as log:
            return bool(look(log, window, now=now).closed_by)
    except TransportError:
        if now - window.opened_at >= window.max_wait_s:
            raise
        return False


kafka_backlog = KafkaBacklog(name="tasks.sensors.kafka_backlog.kafka_backlog")

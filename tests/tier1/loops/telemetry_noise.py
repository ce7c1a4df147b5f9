"""A fleet whose loss only scatters: how often does the engine see a drift that is none?

Used with few turns by the tests and with many by the figure `data_engine.false_alarms`.
"""

from __future__ import annotations

import random
from collections import deque

from tier1.config import DataEngineConfig
from tier1.loops.findings import Open, decide
from tier1.loops.fleet_statistics import Device, Heard, measure

HOUR = 3600.0


def false_alarms(*, turns: int, devices: int, spread: float, every: int, seed: int) -> int:
    """Return how many drift findings are raised in hourly turns under the default settings.

    Args:
        turns: hours.
        devices: of one region.
        spread: standard deviation of a device's loss in a turn, nats per token.
        every: a device tells something every so many hours.
        seed: of the draws.
    """
    rng, settings, opened = random.Random(seed), DataEngineConfig(), dict[str, Open]()
    rows = [deque[Heard](maxlen=int(settings.reference_s / HOUR) // every) for _ in range(devices)]
    raised = 0
    for hour in range(turns):
        now = hour * HOUR
        for number, own in enumerate(rows):
            if (hour + number) % every == 0:
                own.append(Heard(at=now, loss_first=rng.gauss(3.0, spread), loss_change=-0.5, records=1))
        fleet = [Device(region="r", device_class="c", rows=list(own), expert_tokens={}) for own in rows]
        measured = measure(fleet, now=now, window_s=settings.window_s, min_devices=settings.min_devices)
        decision = decide(measured, opened, [], now=now, settings=settings, federation="f")
        opened = decision.opened
        raised += sum(each.status == "raised" and each.kind == "drift" for each in decision.findings)
    return raised

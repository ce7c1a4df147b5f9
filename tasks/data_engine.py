"""Tasks of the data engine: one look at the telemetry, in one piece or mapped over the regions of the devices."""

import time
from datetime import timedelta
from functools import partial
from typing import NamedTuple

from flytekit import Resources, task

from images import specs
from tasks.decks import show
from tasks.errors import retry_recoverable
from tasks.federation import ConfigFile, opened
from tier1.loops.records import EngineReport, RegionHeard

looking = partial(
    task,
    container_image=specs.control,
    requests=Resources(cpu="500m", mem="2Gi"),
    retries=3,
    timeout=timedelta(minutes=30),
)


class Turn(NamedTuple):
    """A planned turn and its regions; outputs of their own, because Flyte maps over no list inside a dataclass."""

    turn: str
    regions: list[str]


@looking(enable_deck=True, deck_fields=())
@retry_recoverable
def turn_engine(config: ConfigFile) -> EngineReport:
    """Read what is new on telemetry.edge and ask for the loops that its findings need."""
    from tier1.loops import data_engine

    with opened(config) as fed:
        report = data_engine.turn_engine(fed, now=time.time())
        show("Findings", data_engine.findings_html(report))
        return report


@looking()
@retry_recoverable
def plan_turn(config: ConfigFile) -> Turn:
    """Fix what is new on telemetry.edge, and name the regions of the registered devices."""
    from tier1.loops import data_engine_regions

    with opened(config) as fed:
        return Turn(*data_engine_regions.plan_turn(fed))


@looking()
@retry_recoverable
def hear_region(region: str, config: ConfigFile, turn: str) -> RegionHeard:
    """Read and verify what the devices of one region told."""
    from tier1.loops import data_engine_regions

    with opened(config) as fed:
        return data_engine_regions.hear_region(fed, turn, region)


@looking(enable_deck=True, deck_fields=())
@retry_recoverable
def collect_turn(config: ConfigFile, turn: str, heard: list[RegionHeard | None]) -> EngineReport:
    """Decide on what all regions told, hear those that failed, and ask for the loops that the findings need."""
    from tier1.loops import data_engine, data_engine_regions

    with opened(config) as fed:
        report = data_engine_regions.collect_turn(fed, turn, heard, now=time.time())
        show("Findings", data_engine.findings_html(report))
        return report

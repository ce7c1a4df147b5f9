"""Task of the data engine: one look at the telemetry."""

import time
from datetime import timedelta

from flytekit import Resources, task

from images import specs
from tasks.decks import show
from tasks.errors import retry_recoverable
from tasks.federation import ConfigFile, opened
from tier1.loops.records import EngineReport


@task(
    container_image=specs.control,
    requests=Resources(cpu="500m", mem="2Gi"),
    retries=3,
    timeout=timedelta(minutes=30),
    enable_deck=True,
    deck_fields=(),
)
@retry_recoverable
def turn_engine(config: ConfigFile) -> EngineReport:
    """Read what is new on telemetry.edge and ask for the loops that its findings need."""
    from tier1.loops import data_engine

    with opened(config) as fed:
        report = data_engine.turn_engine(fed, now=time.time())
        show("Findings", data_engine.findings_html(report))
        return report

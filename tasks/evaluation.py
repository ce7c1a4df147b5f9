"""Tasks that measure a candidate suite by suite; the middle one is mapped over the suites."""

from datetime import timedelta
from typing import NamedTuple

from flytekit import Resources, task

from images import specs
from tasks.decks import show
from tasks.errors import retry_recoverable
from tasks.federation import ConfigFile, opened
from tier1.loops.records import SuiteLoss, SuitesMeasured


class Planned(NamedTuple):
    """A candidate and its suites; outputs of their own, because Flyte maps over no list inside a dataclass."""

    candidate: str
    suites: list[str]


@task(
    container_image=specs.control, requests=Resources(cpu="500m", mem="1Gi"), retries=3, timeout=timedelta(minutes=10)
)
@retry_recoverable
def plan_suites(config: ConfigFile, candidate: str) -> Planned:
    """Say which candidate is measured, and on which suites."""
    from tier1.loops import evaluate_suites

    with opened(config) as fed:
        return Planned(*evaluate_suites.plan_suites(fed, candidate))


@task(container_image=specs.tier1, requests=Resources(cpu="2", mem="8Gi"), retries=3, timeout=timedelta(hours=2))
@retry_recoverable
def measure_suite(suite: str, config: ConfigFile, candidate: str) -> SuiteLoss:
    """Measure a candidate and its parent on one suite, and keep it for the gate."""
    from tier1.loops import evaluate_suites

    with opened(config) as fed:
        return evaluate_suites.measure_suite(fed, candidate, suite)


@task(
    container_image=specs.control,
    requests=Resources(cpu="500m", mem="1Gi"),
    retries=3,
    timeout=timedelta(minutes=10),
    enable_deck=True,
    deck_fields=(),
)
@retry_recoverable
def collect_suites(candidate: str, suites: list[str], losses: list[SuiteLoss | None]) -> SuitesMeasured:
    """Say what was measured and what is missing."""
    from tier1.loops import evaluate_suites

    measured = evaluate_suites.collect(candidate, suites, losses)
    show("Suites", evaluate_suites.measured_html(measured))
    return measured

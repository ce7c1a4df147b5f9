"""Tasks of the fast loop: take a cut of the device updates, or open a window for a sensor and keep its cut; fold it."""

import time
from datetime import timedelta

from flytekit import Resources, task

from images import specs
from tasks.decks import show
from tasks.errors import retry_recoverable
from tasks.federation import ConfigFile, opened
from tier1.loops.records import CandidateRef, CutRef, TakenCut, Window


@task(container_image=specs.tier1, requests=Resources(cpu="500m", mem="1Gi"), retries=3, timeout=timedelta(minutes=30))
@retry_recoverable
def take_cut(config: ConfigFile) -> CutRef:
    """Close the window: the offset ranges after head's cut, bound to the log they were read from."""
    from tier1.loops.aggregate_experts import take_updates

    with opened(config) as fed:
        return take_updates(fed)


@task(container_image=specs.tier1, requests=Resources(cpu="500m", mem="1Gi"), retries=3, timeout=timedelta(minutes=30))
@retry_recoverable
def open_window(config: ConfigFile) -> Window:
    """Say what a sensor shall wait for, from where head's cut ended."""
    from tier1.loops import aggregate_experts

    with opened(config) as fed:
        return aggregate_experts.open_window(fed, now=time.time())


@task(
    container_image=specs.control, requests=Resources(cpu="500m", mem="1Gi"), retries=3, timeout=timedelta(minutes=10)
)
@retry_recoverable
def keep_cut(config: ConfigFile, taken: TakenCut) -> CutRef:
    """Store the cut that a sensor returned; it comes back empty when another loop folded these updates meanwhile."""
    from tier1.loops import aggregate_experts

    with opened(config) as fed:
        return aggregate_experts.keep_cut(fed, taken)


@task(
    container_image=specs.tier1,
    requests=Resources(cpu="2", mem="8Gi"),
    retries=3,
    timeout=timedelta(hours=1),
    enable_deck=True,
    deck_fields=(),
)
@retry_recoverable
def fold_experts(config: ConfigFile, cut: CutRef) -> CandidateRef:
    """Verify, weigh and fold the updates of the cut into head; the deck names who contributed."""
    from tier1.loops.aggregate_experts import fold_updates
    from tier1.loops.reports import contributors_html

    with opened(config) as fed:
        candidate = fold_updates(fed, cut)
        show("Contributors", contributors_html(fed, candidate))
        return candidate

"""Tasks of the outer loop: settle a candidate by the automatic gate, show it to a person, record the decision."""

from datetime import timedelta

from flytekit import Resources, task

from images import specs
from tasks.decks import show
from tasks.errors import retry_recoverable
from tasks.federation import ConfigFile, opened
from tier1.loops.records import CandidateRef, Outcome, Settled

NEWEST = ""  # in place of a digest: what waits, a candidate to settle or else a version to decide on


@task(container_image=specs.tier1, requests=Resources(cpu="2", mem="8Gi"), retries=3, timeout=timedelta(hours=2))
@retry_recoverable
def settle(config: ConfigFile, candidate: str = NEWEST) -> Settled:
    """Evaluate, halve η and fold again while the automatic gate fails, then advance head or record the rejection."""
    from tier1.loops.evaluate_and_promote import settle_candidate

    with opened(config) as fed:
        return settle_candidate(fed, CandidateRef(digest=candidate, parent_version=-1, n_accepted=0, n_refused=0))


@task(
    container_image=specs.control,
    requests=Resources(cpu="500m", mem="1Gi"),
    retries=3,
    timeout=timedelta(minutes=10),
    enable_deck=True,
    deck_fields=(),
)
@retry_recoverable
def report(config: ConfigFile, settled: Settled) -> None:
    """Show SecOps what waits for a decision: loss per domain, and who contributed."""
    from tier1.loops.reports import contributors_html, evaluation_html

    with opened(config) as fed:
        show("Loss per domain", evaluation_html(fed, settled))
        show("Contributors", contributors_html(fed, settled))


@task(container_image=specs.tier1, requests=Resources(cpu="2", mem="8Gi"), retries=3, timeout=timedelta(hours=4))
@retry_recoverable
def decide(config: ConfigFile, settled: Settled, answer: str, channel: str) -> Outcome:
    """Record the decision: promote the version, or void it and fold its successors again without it."""
    from tier1.loops import evaluate_and_promote

    with opened(config) as fed:
        return evaluate_and_promote.decide(fed, settled, answer, channel)

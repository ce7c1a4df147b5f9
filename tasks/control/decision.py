"""The router of the outer loop: ask a person only when there is something to decide.

A gate that stood in the workflow itself would stop every scheduled round, the empty ones too, until somebody answered
it. The router asks when a version waits, and passes on an empty answer when the cut was empty or the automatic gate
refused; both are recorded results already.
"""

from datetime import timedelta

from flytekit import Resources, dynamic, wait_for_input

from images import specs
from tier1.loops.records import GATE, Settled

PATIENCE = timedelta(days=2)
ANSWERS = "approve | reject | reject: <reason> | the output of `fednested approvals token`"


@dynamic(
    container_image=specs.control,
    requests=Resources(cpu="500m", mem="1Gi"),
    environment=specs.ROUTER_ENVIRONMENT,
)
def ask_secops(settled: Settled) -> str:
    """Return the person's decision on the new head: a decision token, `approve`, `reject` or `reject: reason`."""
    import structlog

    log = structlog.get_logger()
    if settled.status != "head":
        log.info("decision.not_needed", status=settled.status, reason=settled.reason)
        return ""
    log.info(
        "decision.wanted", version=settled.version, manifest=settled.manifest, tries=settled.tries, answers=ANSWERS
    )
    return wait_for_input(GATE, timeout=PATIENCE, expected_type=str)

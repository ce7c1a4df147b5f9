"""One pass of all loops: the one to schedule and to demo.

    [core_update → settle] → aggregate_experts → evaluate_and_promote → broadcast

With `core`, the core update is settled before the cut is taken, so that the devices' updates fold into its result and
one decision of SecOps covers both. A round in which nothing arrived asks about the newest version that still waits for
a decision, or else nobody, and announces the champion once more.
"""

from typing import NamedTuple

from flytekit import Resources, dynamic, workflow

from images import specs
from tasks.failures import nested_round_failed
from tasks.federation import ConfigFile
from tasks.promotion import settle
from tier1.loops.records import Outcome, Published, Settled
from workflows.aggregate_experts import aggregate_experts
from workflows.broadcast import broadcast
from workflows.core_update import core_update
from workflows.evaluate_and_promote import evaluate_and_promote
from workflows.order import in_order


class Round(NamedTuple):
    """What one round came to."""

    outcome: Outcome
    published: Published


SKIPPED = Settled(
    status="nothing", version=-1, manifest="", candidate="", tries=0, reason="no core update in this round"
)


@dynamic(
    container_image=specs.control,
    requests=Resources(cpu="500m", mem="1Gi"),
    environment=specs.ROUTER_ENVIRONMENT,
)
def slow_loop(config: ConfigFile, core: bool) -> Settled:
    """Train and settle the core, or pass by."""
    if not core:
        return SKIPPED
    candidate = core_update(config=config)
    return settle(config=config, candidate=candidate.digest)


@workflow(on_failure=nested_round_failed)
def nested_round(config: ConfigFile, core: bool = False, channel: str = "console") -> Round:
    """W ← W + [η_core·ΔW_core + η_T1·ΔW_experts] + η_T2·ΔW_agg,  W_champion ← W,  W_device ← W_champion.

    Args:
        config: the federation's tier1.yaml.
        core: also train the core, before the devices' updates are folded.
        channel: how a bare answer reaches the gate, `console` or, in the local profile only, `flag`.

    Returns:
        The decision, and the champion as devices can fetch it.
    """
    settled = slow_loop(config=config, core=core)
    candidate = aggregate_experts(config=config)
    outcome = evaluate_and_promote(config=config, candidate=candidate.digest, channel=channel)
    published = broadcast(config=config)
    in_order(settled, candidate, outcome, published)
    return Round(outcome=outcome, published=published)

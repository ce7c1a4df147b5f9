"""The outer loop by sensor: the round begins when the window over the devices' updates closes, and not by the clock.

    open_window → kafka_window → keep_cut → fold_experts → evaluate_and_promote → broadcast

While it waits no pod runs: the connector service looks (`docs/sensors-and-trigger.md`).
"""

from flytekit import workflow

from tasks.aggregation import fold_experts, keep_cut, open_window
from tasks.failures import sensed_round_failed
from tasks.federation import ConfigFile
from tasks.sensors.kafka_window import kafka_window
from workflows.broadcast import broadcast
from workflows.evaluate_and_promote import evaluate_and_promote
from workflows.nested_round import Round
from workflows.order import in_order


@workflow(on_failure=sensed_round_failed)
def sensed_round(config: ConfigFile, channel: str = "console") -> Round:
    """W_experts ← W_experts + η_T2·ΔW_agg,  W_champion ← W,  W_device ← W_champion, once enough has arrived.

    Args:
        config: the federation's tier1.yaml.
        channel: how a bare answer reaches the gate, `console` or, in the local profile only, `flag`.

    Returns:
        The decision, and the champion as devices can fetch it.
    """
    window = open_window(config=config)
    cut = keep_cut(config=config, taken=kafka_window(window=window))
    candidate = fold_experts(config=config, cut=cut)
    outcome = evaluate_and_promote(config=config, candidate=candidate.digest, channel=channel)
    published = broadcast(config=config)
    in_order(outcome, published)
    return Round(outcome=outcome, published=published)

"""The middle, fast loop: fold what the devices sent.

    W_experts ← W_experts + η_T2 · ΔW_agg

An expert that no device of the cut adapted stays bit-identical.
"""

from flytekit import workflow

from tasks.aggregation import fold_experts, take_cut
from tasks.failures import aggregate_experts_failed
from tasks.federation import ConfigFile
from tier1.loops.records import CandidateRef


@workflow(on_failure=aggregate_experts_failed)
def aggregate_experts(config: ConfigFile) -> CandidateRef:
    """W_experts ← W_experts + η_T2·ΔW_agg.

    Args:
        config: the federation's tier1.yaml.

    Returns:
        The folded candidate, which waits for evaluate_and_promote; its digest is empty when nothing arrived in time.
    """
    cut = take_cut(config=config)
    return fold_experts(config=config, cut=cut)

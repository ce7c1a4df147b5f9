"""The middle, fast loop where experts are many: one fold on several machines.

    take_cut → plan_fold → fold_shard for each shard → collect_fold

The candidate is that of `aggregate_experts`, to its digest. A shard that fails on all its attempts costs time and never
the candidate: who collects folds it.
"""

from functools import partial

from flytekit import workflow

from tasks.aggregation import take_cut
from tasks.failures import aggregate_experts_sharded_failed
from tasks.federation import ConfigFile
from tasks.sharded_aggregation import collect_fold, fold_shard, plan_fold
from tier1.loops.records import CandidateRef
from workflows.side_by_side import side_by_side


@workflow(on_failure=aggregate_experts_sharded_failed)
def aggregate_experts_sharded(config: ConfigFile, shards: int = 8) -> CandidateRef:
    """W_e ← W_e + η_T2·ΔW_agg,e for the experts e of each shard.

    Args:
        config: the federation's tier1.yaml.
        shards: how many parts the experts are folded in, 1..1024.

    Returns:
        The folded candidate, which waits for evaluate_and_promote; its digest is empty when nothing arrived in time.
    """
    cut = take_cut(config=config)
    plan, numbers = plan_fold(config=config, cut=cut, shards=shards)
    folded = side_by_side(partial(fold_shard, config=config, plan=plan), shard=numbers)
    return collect_fold(config=config, cut=cut, plan=plan, folded=folded)

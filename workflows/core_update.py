"""The middle, slow loop: train core and experts in the data centre.

    W_core    ← W_core    + η_core · ΔW_core
    W_experts ← W_experts + η_T1   · ΔW_experts

The delta is a signed input like any device's: it is folded into whatever head is when the training is done.
"""

from flytekit import workflow

from tasks.failures import core_update_failed
from tasks.federation import ConfigFile
from tasks.training import authorise, fold_core, pack, train
from tier1.loops.records import CandidateRef


@workflow(on_failure=core_update_failed)
def core_update(config: ConfigFile, run: str = "") -> CandidateRef:
    """W_core ← W_core + η_core·ΔW_core,  W_experts ← W_experts + η_T1·ΔW_experts.

    Args:
        config: the federation's tier1.yaml.
        run: name of this training run; a run that died goes on under its own name. Empty means the execution's.

    Returns:
        The folded candidate, which waits for evaluate_and_promote.
    """
    grant, run = authorise(config=config, run=run)
    data = pack(config=config, grant=grant)
    delta = train(config=config, data=data, run=run)
    return fold_core(config=config, delta=delta)

"""The middle, slow loop on several ranks; one workflow per size, equal to `core_update` but for where it trains.

    W_core    ← W_core    + η_core · ΔW_core
    W_experts ← W_experts + η_T1   · ΔW_experts

ΔW is that of the whole batch, however many ranks share it. The host that registers these needs torch (the CPU build).
"""

from flytekit import workflow

from tasks.failures import core_update_failed
from tasks.federation import ConfigFile
from tasks.gpu.train import train_2_cpu, train_2x8_gpu, train_8_gpu
from tasks.promotion import settle
from tasks.training import authorise, fold_core, pack
from tier1.loops.records import CandidateRef, Settled


@workflow(on_failure=core_update_failed)
def core_update_2_cpu(config: ConfigFile, run: str = "") -> CandidateRef:
    """W_core ← W_core + η_core·ΔW_core,  W_experts ← W_experts + η_T1·ΔW_experts, on 2 CPU ranks.

    Args:
        config: the federation's tier1.yaml.
        run: name of this training run; a run that died goes on under its own name. Empty means the execution's.

    Returns:
        The folded candidate, which waits for evaluate_and_promote.
    """
    grant, run = authorise(config=config, run=run)
    data = pack(config=config, grant=grant)
    delta = train_2_cpu(config=config, data=data, run=run)
    return fold_core(config=config, delta=delta)


@workflow(on_failure=core_update_failed)
def core_update_8_gpu(config: ConfigFile, run: str = "") -> CandidateRef:
    """W_core ← W_core + η_core·ΔW_core,  W_experts ← W_experts + η_T1·ΔW_experts, on 8 GPUs."""
    grant, run = authorise(config=config, run=run)
    data = pack(config=config, grant=grant)
    delta = train_8_gpu(config=config, data=data, run=run)
    return fold_core(config=config, delta=delta)


@workflow(on_failure=core_update_failed)
def core_update_2x8_gpu(config: ConfigFile, run: str = "") -> CandidateRef:
    """W_core ← W_core + η_core·ΔW_core,  W_experts ← W_experts + η_T1·ΔW_experts, on 2 × 8 GPUs."""
    grant, run = authorise(config=config, run=run)
    data = pack(config=config, grant=grant)
    delta = train_2x8_gpu(config=config, data=data, run=run)
    return fold_core(config=config, delta=delta)


@workflow(on_failure=core_update_failed)
def settled_core_update_8_gpu(config: ConfigFile, run: str = "") -> Settled:
    """Head ← W + [η_core·ΔW_core + η_T1·ΔW_experts] if no suite gets worse, on 8 GPUs; the next round asks SecOps.

    Args:
        config: the federation's tier1.yaml.
        run: name of this training run; empty means the execution's.
    """
    candidate = core_update_8_gpu(config=config, run=run)
    return settle(config=config, candidate=candidate.digest)

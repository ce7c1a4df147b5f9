"""What of DeepSpeed a run may choose, and the JSON that DeepSpeed gets of it.

ZeRO (arXiv:1910.02054) cuts over the ranks: stage 1 the optimiser state, 2 also the gradients, 3 also the weights.
Plain torch holds all of it on every rank, which is stage 0: leave `core.deepspeed` out for it. Expert parallelism cuts
the experts over groups of ranks and sends tokens to them (GShard, arXiv:2006.16668), where ZeRO-3 would send weights.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fednested_lib.config import Section
from fednested_lib.errors import ConfigError
from tier1.training.ranks import BUCKET_ELEMENTS, Ranks
from tier1.training.settings import ADAM_BETAS, TrainSettings

# Those for which DeepSpeed has a preset.
AUTOEP_FAMILIES = {"mixtral", "qwen3_moe"}


class DeepSpeedSettings(Section):
    """`core.deepspeed`: what is cut over the ranks, and in which precision it is computed."""

    zero_stage: Literal[1, 2, 3] = 2
    expert_parallel: int = Field(default=1, ge=1, le=4096)
    bf16: bool = False
    offload: bool = False


def check_layout(chosen: DeepSpeedSettings, family: str, model: Any, ranks: Ranks) -> None:
    """Refuse what cannot be cut, or what DeepSpeed would compute differently.

    AutoEP's router has no noise, and transformers' adds it in place, which the hooks of ZeRO-3 forbid.

    Args:
        chosen: The settings.
        family: Model family.
        model: The model's transformers configuration.
        ranks: Those that train together.

    Raises:
        ConfigError: The experts do not divide, or the family or its router noise does not go with the layout.
    """
    size, n_experts = chosen.expert_parallel, getattr(model, "num_experts", None) or model.num_local_experts
    if getattr(model, "router_jitter_noise", 0.0) and (size > 1 or chosen.zero_stage == 3):
        raise ConfigError(
            f"model.config.router_jitter_noise must be 0 with core.deepspeed's zero_stage 3 or expert_parallel, got "
            f"{model.router_jitter_noise:g}: train with zero_stage 2 and expert_parallel 1"
        )
    if size == 1:
        return
    if family not in AUTOEP_FAMILIES:
        known = ", ".join(sorted(AUTOEP_FAMILIES))
        raise ConfigError(
            f"core.deepspeed.expert_parallel must be 1 for family {family}, got {size}: {known} have more"
        )
    fitting = [k for k in range(1, ranks.world_size + 1) if ranks.world_size % k == 0 and n_experts % k == 0]
    if size not in fitting:
        raise ConfigError(
            f"core.deepspeed.expert_parallel must divide the {ranks.world_size} rank(s) and the {n_experts} experts, "
            f"got {size}: set it to {' or '.join(map(str, fitting))}, or train on another number of ranks"
        )


def engine_json(chosen: DeepSpeedSettings, settings: TrainSettings, ranks: Ranks) -> dict[str, Any]:
    """Return DeepSpeed's configuration of one run.

    Raises:
        ConfigError: The batch does not divide into micro-batches.
    """
    rows, passes = settings.rows_per_pass(ranks.world_size), settings.passes(ranks.world_size)
    zero: dict[str, Any] = {
        "stage": chosen.zero_stage,
        "overlap_comm": False,  # sums in a fixed order
        # DeepSpeed's own are 2 GB, which deterministic torch fills anew at every step.
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if chosen.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": ranks.device != "cpu"}
    return {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": settings.grad_clip,
        # torch's own AdamW: DeepSpeed's are compiled on first use, which takes minutes and a compiler.
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "betas": list(ADAM_BETAS)}},
        "zero_optimization": zero,
        "bf16": {"enabled": chosen.bf16},
        "expert_parallel": {"enabled": chosen.expert_parallel > 1, "autoep_size": chosen.expert_parallel},
        "steps_per_print": 2**31,
    }

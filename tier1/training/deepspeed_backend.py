"""The DeepSpeed engine: weights, gradients and optimiser state cut over the ranks (ZeRO), experts too if asked.

    loss, schedule, clip and AdamW are those of `TorchBackend`; what differs is who holds what

The training state is gathered under the names of transformers, as `TorchBackend` gives it. So a checkpoint knows
nothing of the layout: a run goes on with another stage, another number of ranks or without DeepSpeed. It passes through
the memory of rank 0, at 12 bytes per parameter. Importing this module does not import deepspeed, which takes seconds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fednested_lib.errors import ConfigError
from tier1.training.backends import OPTIMIZER, WEIGHTS, parameter_groups, ready
from tier1.training.deepspeed_config import DeepSpeedSettings, check_layout, engine_json
from tier1.training.expert_parallel import Part, parts_of, registry_by_name
from tier1.training.loss import Term, batch_loss
from tier1.training.ranks import ALONE, Ranks
from tier1.training.settings import TrainSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedBackend:
    """DeepSpeed ZeRO 1–3 with or without expert parallelism; ``terms`` are added to the loss."""

    def __init__(self, chosen: DeepSpeedSettings | None = None, terms: Sequence[Term] = ()):
        self._chosen, self._terms = chosen or DeepSpeedSettings(), tuple(terms)
        self._moments = MOMENTS

    @property
    def memory_remedy(self) -> str:
        """What cuts or moves more of the weights and the optimiser than is now."""
        stage, steps = self._chosen.zero_stage, []
        if stage < 3:
            steps.append(f"raise core.deepspeed.zero_stage (now {stage})")
        if not self._chosen.offload:
            steps.append("set core.deepspeed.offload to true")
        return ", ".join(steps) or "train on GPUs with more memory"

    @property
    def chosen(self) -> DeepSpeedSettings:
        """The layout."""
        return self._chosen

    def prepare(self, model: nn.Module, settings: TrainSettings, family: str, ranks: Ranks = ALONE) -> None:
        """Take the model over; its parameters are DeepSpeed's from here on.

        Raises:
            ConfigError: The experts or the batch do not divide as the settings say, or DeepSpeed is not installed.
        """
        self._settings, self._ranks = settings, ranks
        check_layout(self._chosen, family, model.config, ranks)
        config = engine_json(self._chosen, settings, ranks)
        ready(model, settings)
        exact = {name: parameter.detach() for name, parameter in model.named_parameters()} if self._chosen.bf16 else {}
        # DeepSpeed splits groups by name where experts are cut.
        groups = [group | {"name": str(n)} for n, group in enumerate(parameter_groups(model, settings, family))]
        deepspeed = _deepspeed(ranks)
        with registry_by_name():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, model_parameters=groups, config=config
            )
        self._parts = parts_of(self._engine.module)
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]
        # DeepSpeed makes its fp32 weights of the bf16 ones: the delta would carry the rounding of the whole base.
        for name, weights in exact.items():
            put(self._parts[name], weights)

    def step(self, rows: Tensor, rate: float) -> float:
        """Take one optimiser step; NaN and no step if loss or gradient is not finite."""
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        loss = torch.zeros((), device=self._ranks.device)
        passes = rows.to(self._ranks.device).split(self._settings.rows_per_pass(self._ranks.world_size))
        with self._ranks.together():
            for number, part in enumerate(passes, start=1):
                total, of_part = batch_loss(self._engine, part, self._settings, self._ranks, self._terms)
                self._engine.backward(total)
                loss += of_part / len(passes)
                if number < len(passes):
                    self._engine.step()
            self._ranks.mean_([loss])
            if not math.isfinite(loss.item()):
                return math.nan
            self._engine.step()
        return math.nan if self._optimizer.overflow else loss.item()

    def grad_norm(self) -> float:
        """Return the last step's gradient norm, before it was clipped."""
        return float(self._engine.get_global_grad_norm())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the fp32 weights, on the CPU."""
        return {name: self._whole(part).cpu() for name, part in self._parts.items()}

    def training_state(self) -> dict[str, Tensor]:
        """Return weights and AdamW's moments on rank 0; the others take part and return nothing."""
        self._link()
        state = {}
        steps = self._optimizer.optimizer.state[next(self._flats())]["step"]
        for name, part in self._parts.items():
            found = {WEIGHTS + name: self._whole(part)}
            found |= {f"{OPTIMIZER}{key}.{name}": self._whole(part, key) for key in self._moments}
            if self._ranks.rank == 0:
                state |= {key: tensor.cpu() for key, tensor in found.items()}
                state[f"{OPTIMIZER}step.{name}"] = steps.clone()
        return state

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state, of whatever engine and layout."""
        steps = state.get(f"{OPTIMIZER}step.{next(iter(self._parts))}", torch.tensor(0.0))
        for flat in self._flats():
            moments = {key: torch.zeros_like(flat) for key in self._moments}
            self._optimizer.optimizer.state[flat] = {"step": steps.clone(), **moments}
        self._link()
        for name, part in self._parts.items():
            put(part, state[WEIGHTS + name])
            for key in self._moments:
                if f"{OPTIMIZER}{key}.{name}" in state:  # else zero, as it was where it was not kept
                    put(part, state[f"{OPTIMIZER}{key}.{name}"], key)

    def _whole(self, part: Part, key: str | None = None) -> Tensor:
        """Return weights, or the moment named ``key``, of one parameter of transformers; every rank calls."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        with self._ranks.together():
            mine = [
                safe_get_full_optimizer_state(piece, key) if key else safe_get_full_fp32_param(piece)
                for piece in part.pieces
            ]
            return part.assemble(mine)

    def _flats(self) -> Iterator[Tensor]:
        """Yield this rank's flat partitions, the parameters that AdamW sees."""
        optimizer = self._optimizer
        stage_3 = self._chosen.zero_stage == 3
        yield from optimizer.fp32_partitioned_groups_flat if stage_3 else optimizer.single_partition_of_fp32_groups

    def _link(self) -> None:
        """Let parameters find their moments: DeepSpeed does it after the first group's first step, for that alone."""
        if self._chosen.zero_stage < 3:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()


def put(part: Part, whole: Tensor, key: str | None = None) -> None:
    """Set weights, or the moment named ``key``, of one parameter of transformers to this rank's share of ``whole``."""
    from deepspeed import utils

    for piece, value in zip(part.pieces, part.cut(whole), strict=True):
        full = value.to(piece.device, torch.float32)
        if not hasattr(piece, "ds_id"):
            if key:
                utils.safe_set_full_optimizer_state(piece, full, key)
            else:
                utils.safe_set_full_fp32_param(piece, full)
                piece.data.copy_(full)
            continue
        mine = partition(piece, full)
        if key:
            utils.safe_set_local_optimizer_state(piece, mine, key)
        else:
            utils.safe_set_local_fp32_param(piece, mine)
            piece.ds_tensor.data.copy_(mine)
            if piece.data.shape == full.shape:  # a small parameter that ZeRO-3 keeps whole
                piece.data.copy_(full)


def partition(piece: nn.Parameter, full: Tensor) -> Tensor:
    """Return this rank's partition of a parameter of ZeRO-3, padded as DeepSpeed pads."""
    size, group = piece.ds_tensor.numel(), piece.ds_process_group
    padded = full.new_zeros(size * dist.get_world_size(group))
    padded[: full.numel()] = full.flatten()
    return padded.narrow(0, size * dist.get_rank(group), size)


def _deepspeed(ranks: Ranks) -> ModuleType:
    """Import DeepSpeed and let it use the process group that is there, or one of this process alone.

    Raises:
        ConfigError: It is not installed.
    """
    if ranks.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it also where nobody launched ranks
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            "core.deepspeed needs the package deepspeed, which is not installed here: install it as docs/training.md "
            "says, or leave core.deepspeed out for plain torch"
        ) from error
    # Compiled with the first engine, which takes minutes and a compiler; gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "gloo" if ranks.device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed

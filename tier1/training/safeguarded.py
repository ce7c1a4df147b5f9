"""Both engines with safeguards against forgetting, which they make from the weights that a run starts from.

What is added and who rests is the same for both; where it acts is not. Plain torch has EWC as a term of the loss and
holds parameters back. With DeepSpeed weights may be cut, and AdamW sees flat parts of them, so EWC pulls at the
gradients, each rank where it holds the weight, before they are clipped:

    g_i ← g_i + w · F_i · (θ_i − θ*_i)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fednested_lib.errors import ConfigError
from tier1.training.backends import OPTIMIZER, Backend, TorchBackend
from tier1.training.deepspeed_backend import DeepSpeedBackend, partition, put
from tier1.training.deepspeed_config import DeepSpeedSettings
from tier1.training.expert_parallel import Part
from tier1.training.loss import Term
from tier1.training.pace import COLLECTED, Pace, Period, entry_periods, ready_state
from tier1.training.ranks import ALONE, Ranks
from tier1.training.safeguards import Memory, Safeguards, periods_of, terms_of
from tier1.training.settings import TrainSettings

_PERIOD = "period"


def safeguarded(safeguards: Safeguards, memory: Memory, backend: Backend | None = None) -> Backend:
    """Return an engine like ``backend`` (None: plain torch), which is not prepared yet, with safeguards.

    Raises:
        ConfigError: It is an engine that has none.
    """
    if backend is None:
        return SafeguardedBackend(safeguards, memory)
    if isinstance(backend, DeepSpeedBackend):
        return SafeguardedDeepSpeed(safeguards, memory, backend)
    raise ConfigError(f"core.safeguards must be off with the engine {type(backend).__name__}: remove it or the engine")


class SafeguardedBackend(TorchBackend):
    """`TorchBackend` whose loss has the safeguards' terms and whose optimiser keeps their pace.

    Args:
        safeguards: Which are on.
        memory: What they protect.
    """

    def __init__(self, safeguards: Safeguards, memory: Memory):
        super().__init__()
        self._safeguards, self._memory = safeguards, memory
        self._periods: dict[str, Period] = {}

    def prepare(self, model: nn.Module, settings: TrainSettings, family: str, ranks: Ranks = ALONE) -> None:
        """Take the model over; its weights are the base."""
        super().prepare(model, settings, family, ranks)
        self._terms = tuple(_terms(self._safeguards, self._memory, model, settings, ranks))
        self._periods = periods_of(self._safeguards, self._memory, model, family, ranks, settings.document_end)
        named = dict(model.named_parameters())
        Pace({named[name]: entry_periods(period, named[name]) for name, period in self._periods.items()}).attach(
            self._optimizer
        )

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state; what slow groups have collected is part of it."""
        super().load_training_state(state)
        for name, parameter in self._model.named_parameters():
            collected = state.get(f"{OPTIMIZER}{COLLECTED}.{name}")
            if collected is not None and name in self._periods:
                self._optimizer.state[parameter][COLLECTED] = collected.to(parameter.device, copy=True)


class SafeguardedDeepSpeed(DeepSpeedBackend):
    """`DeepSpeedBackend` with the same safeguards.

    Args:
        safeguards: Which are on.
        memory: What they protect.
        engine: Gives the layout.
    """

    def __init__(self, safeguards: Safeguards, memory: Memory, engine: DeepSpeedBackend):
        super().__init__(engine.chosen)
        self._safeguards, self._memory = safeguards, memory

    def prepare(self, model: nn.Module, settings: TrainSettings, family: str, ranks: Ranks = ALONE) -> None:
        """Take the model over; its weights, whole on every rank until then, are the base.

        Raises:
            ConfigError: The safeguards and the layout do not go together, or see `DeepSpeedBackend`.
        """
        safeguards, memory = self._safeguards, self._memory
        _check_rehearsal(safeguards, self.chosen)
        self._terms = tuple(_terms(replace(safeguards, ewc=None), memory, model, settings, ranks))
        periods = periods_of(safeguards, memory, model, family, ranks, settings.document_end)
        fisher = memory.fisher if safeguards.ewc else {}
        rest = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in fisher}
        whole = {
            name: entry_periods(periods.get(name, 1), parameter).float().expand(parameter.shape)
            for name, parameter in model.named_parameters()
            if periods
        }
        super().prepare(model, settings, family, ranks)
        if periods:
            self._keep_pace(whole)
        for name in fisher:
            weight = safeguards.ewc.weight / settings.passes(ranks.world_size)
            self._pull(self._parts[name], weight * fisher[name], rest[name])

    def _keep_pace(self, whole: Mapping[str, Tensor]) -> None:
        """Hold back the entries of the flat parts, which get their periods the way that they get moments."""
        adam, flats = self._optimizer.optimizer, list(self._flats())
        if any(bool((periods > 1).any()) for periods in whole.values()):
            self._moments = (*self._moments, COLLECTED)
        for flat in flats:
            state = ready_state(adam, flat)
            state |= {key: torch.zeros_like(flat) for key in self._moments if key not in state}
            state[_PERIOD] = torch.ones_like(flat)
        self._link()
        for name, part in self._parts.items():
            put(part, whole[name], _PERIOD)
        Pace({flat: adam.state[flat].pop(_PERIOD).to(torch.int32) for flat in flats}).attach(adam)
        self._link()

    def _pull(self, part: Part, stiffness: Tensor, rest: Tensor) -> None:
        """Add EWC's share to the gradient of each piece that this rank has of a parameter, before ranks are summed."""
        for piece, spring, origin in zip(part.pieces, part.cut(stiffness), part.cut(rest), strict=True):
            if hasattr(piece, "ds_id"):
                piece.register_hook(_pull_partition(piece, spring, origin, self._ranks.world_size))
            else:
                # Of an expert's gradient each rank of the group gives a share, but only one has the spring.
                times = 1 if part.group is None else dist.get_world_size(part.group)
                piece.register_hook(_pull_whole(piece, spring * times, origin))


def _check_rehearsal(safeguards: Safeguards, layout: DeepSpeedSettings) -> None:
    """Refuse what DeepSpeed 0.19.8 cannot: ZeRO-3 stops where a step has a second forward pass (an assertion)."""
    for name in ("replay", "distillation"):
        if getattr(safeguards, name) and layout.zero_stage == 3:
            raise ConfigError(
                f"core.safeguards.{name} must be off with core.deepspeed.zero_stage 3: set zero_stage to 2, with "
                "expert_parallel where the weights do not fit, or use ewc, freeze or frequencies"
            )


def _pull_whole(piece: nn.Parameter, spring: Tensor, origin: Tensor):
    spring, origin = spring.to(piece.device), origin.to(piece.device, piece.dtype)
    return lambda gradient: gradient + (spring * (piece.detach() - origin)).to(gradient.dtype)


def _pull_partition(piece: nn.Parameter, spring: Tensor, origin: Tensor, world_size: int):
    """Pull at the entries of this rank alone, for all: the mean over the ranks divides by their number."""
    stored = piece.ds_tensor
    start = stored.numel() * dist.get_rank(piece.ds_process_group)
    n = max(0, min(stored.numel(), spring.numel() - start))
    spring = partition(piece, spring.to(stored.device)) * world_size
    origin = partition(piece, origin.to(stored.device, stored.dtype))

    def pull(gradient: Tensor) -> Tensor:
        flat = gradient.flatten().clone()
        flat[start : start + n] += (spring * (stored - origin))[:n].to(flat.dtype)
        return flat.view_as(gradient)

    return pull


def _terms(
    safeguards: Safeguards, memory: Memory, model: nn.Module, settings: TrainSettings, ranks: Ranks
) -> Sequence[Term]:
    return terms_of(safeguards, memory, model, ranks, settings.document_end, settings.passes(ranks.world_size))

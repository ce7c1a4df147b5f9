"""Plain torch with safeguards against forgetting, which it makes from the weights that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tier1.training.backends import TorchBackend
from tier1.training.pace import Pace
from tier1.training.ranks import ALONE, Ranks
from tier1.training.safeguards import Memory, Safeguards, pace_of, terms_of
from tier1.training.settings import TrainSettings

_PACE = "pace."


class SafeguardedBackend(TorchBackend):
    """`TorchBackend` whose loss has the safeguards' terms and whose optimiser keeps their pace.

    Args:
        safeguards: Which are on.
        memory: What they protect.
    """

    def __init__(self, safeguards: Safeguards, memory: Memory):
        super().__init__()
        self._safeguards, self._memory = safeguards, memory
        self._pace: Pace | None = None

    def prepare(self, model: nn.Module, settings: TrainSettings, family: str, ranks: Ranks = ALONE) -> None:
        """Take the model over; its weights are the base."""
        super().prepare(model, settings, family, ranks)
        self._terms = tuple(terms_of(self._safeguards, self._memory, model, ranks.world_size))
        self._pace = pace = pace_of(self._safeguards, self._memory, model, family)
        if pace:
            parameters = dict(model.named_parameters())
            self._optimizer.register_step_pre_hook(lambda optimizer, *_: pace.before(parameters, optimizer))
            self._optimizer.register_step_post_hook(lambda optimizer, *_: pace.after(optimizer))

    def training_state(self) -> dict[str, Tensor]:
        """Return weights, AdamW's moments, and the gradients that slow groups have collected."""
        pace = self._pace.state() if self._pace else {}
        return super().training_state() | {_PACE + key: tensor for key, tensor in pace.items()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state."""
        super().load_training_state(state)
        if self._pace:
            own = {key.removeprefix(_PACE): tensor for key, tensor in state.items() if key.startswith(_PACE)}
            self._pace.load_state(own, dict(self._model.named_parameters()))

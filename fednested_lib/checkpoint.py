"""Where a training stands: factors, counters, optimiser state and step, so that it can go on after a pause or a kill.

One file, replaced atomically: a line of canonical JSON, then a safetensors file whose digest the line names; no pickle.
It belongs to one training, by the digest of everything that the training is a function of. One of another training, or
one that was altered, is as good as none: the training then starts from the beginning and gives the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fednested_lib.blobs import write_durable
from fednested_lib.envelope import Digest
from fednested_lib.signing import canonical_json, sha256_hex

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fednested_lib.adapters import RoutedAdapters

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW

_log = structlog.get_logger(__name__)


class _Header(BaseModel):
    """The first line of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    training: Digest
    steps_done: int = Field(ge=1)
    loss_first: float
    loss_last: float
    tensors_sha256: Digest


class Checkpoint:
    """The checkpoint of one training.

    Args:
        path: of the file.
        training: digest of what the training is a function of.
        every: steps between two checkpoints; None writes one only when the training is told to stop.
    """

    def __init__(self, path: Path, *, training: str, every: int | None):
        self.path, self.training, self.every = Path(path), training, every

    def due(self, steps_done: int) -> bool:
        """Tell whether to write one after so many steps."""
        return self.every is not None and steps_done % self.every == 0

    def save(
        self, steps_done: int, first: float, last: float, adapters: RoutedAdapters, optimizer: torch.optim.Optimizer
    ) -> None:
        """Write where the training stands.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        from safetensors.torch import save

        data = save({name: each.contiguous() for name, each in _tensors(adapters, optimizer).items()})
        header = _Header(
            training=self.training,
            steps_done=steps_done,
            loss_first=first,
            loss_last=last,
            tensors_sha256=sha256_hex(data),
        )
        write_durable(self.path, canonical_json(header.model_dump(mode="json")) + b"\n" + data)

    def restore(self, adapters: RoutedAdapters, optimizer: torch.optim.Optimizer) -> tuple[int, float, float] | None:
        """Put adapters and optimiser where the training stood.

        Returns:
            Steps done, loss of the first and of the last of them; None if there is nothing to go on from.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            line, _, data = self.path.read_bytes().partition(b"\n")
            header = _Header.model_validate_json(line)
            if header.training != self.training:
                return None
            if sha256_hex(data) != header.tensors_sha256:
                raise ValueError("digest")
            found = load(data)
        except FileNotFoundError:
            return None
        except (OSError, ValidationError, ValueError, SafetensorError) as error:
            _log.warning("checkpoint.ignored", problem=type(error).__name__)
            return None
        for parameter in _trained(optimizer):
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        places = _tensors(adapters, optimizer)
        assert {name: each.shape for name, each in places.items()} == {name: each.shape for name, each in found.items()}
        for name, place in places.items():
            place.copy_(found[name])
        _log.info("checkpoint.restored", steps_done=header.steps_done)
        return header.steps_done, header.loss_first, header.loss_last

    def remove(self) -> None:
        """Forget it: the training is done."""
        self.path.unlink(missing_ok=True)


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _tensors(adapters: RoutedAdapters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = {
        f"{index}.{name}": optimizer.state[parameter][name]
        for index, parameter in enumerate(_trained(optimizer))
        for name in _MOMENTS
    }
    return adapters.state() | moments

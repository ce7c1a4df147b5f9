"""Checkpoints of a training run: all that its next step depends on, in one file that is whole or not there.

    directory/checkpoint-0.safetensors, checkpoint-1.safetensors      the two newest, in turn

A file holds weights and optimiser state; its header holds (canonical JSON) the step, the losses, the digest of the
tensors and what the run is: base, data, hyper-parameters. The order of the rows and the random numbers of a step follow
from seed and step (`trainer`), so nothing else has to be kept. A file is written beside its place, synced and renamed
over the older of the two, so the newest one is never touched. A `Mirror` keeps a copy elsewhere, where the directory
may die with its machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import structlog
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, uint8

from fednested_lib.blobs import fsync_path
from fednested_lib.errors import StorageError, TrainingError
from fednested_lib.failpoints import failpoint
from fednested_lib.signing import canonical_json

log = structlog.get_logger()

FORMAT = 1
SLOTS = ("checkpoint-0.safetensors", "checkpoint-1.safetensors")
_HEADER = "fednested"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is; losses in nats per token, NaN before the first step."""

    step: int = 0
    loss_first: float = float("nan")
    loss_last: float = float("nan")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A usable checkpoint: its file name, how far it is, and the training state."""

    name: str
    progress: Progress
    state: dict[str, Tensor]


class Mirror(Protocol):
    """A second place for checkpoint files; neither method may raise, for training can go on without it."""

    def restore(self, directory: Path) -> None:
        """Copy what an earlier attempt has saved, if it has, over what is there, in which nothing is whole."""

    def save(self, path: Path) -> None:
        """Copy one checkpoint file there, over the one of the same name."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where one run keeps its checkpoints; one process at a time uses it.

    Args:
        directory: Of this run alone; made when needed.
        every: Steps between two checkpoints, ≥ 1.
        run: What the run is, JSON; a checkpoint that says otherwise belongs to another run.
        mirror: Second place; None: there is none.
    """

    directory: Path
    every: int
    run: Mapping[str, Any] = field(default_factory=dict)
    mirror: Mirror | None = None

    def newest(self, step: int | None = None) -> Found | None:
        """Return the newest checkpoint that is whole and of this run; every newer one is refused by name.

        Args:
            step: Only that of this step; None: of any.

        Raises:
            TrainingError: There are whole checkpoints, but all of another run.
        """
        found = self._newest(step)
        if found is None and self.mirror:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.mirror.restore(self.directory)
            found = self._newest(step)
        return found

    def _newest(self, step: int | None) -> Found | None:
        foreign = None
        headers = {name: header for name, header in self._headers().items() if header}
        if step is not None:
            headers = {name: header for name, header in headers.items() if header["progress"]["step"] == step}
        for name in sorted(headers, key=lambda name: -headers[name]["progress"]["step"]):
            header = headers[name]
            difference = self._difference(header["run"])
            if difference:
                foreign = foreign or f"checkpoint {self.directory / name} is of another run: {difference}"
                log.warning("checkpoint.refused", file=name, reason=f"another run: {difference}")
            elif state := self._read(name, header):
                return Found(name=name, progress=Progress(**header["progress"]), state=state)
        if foreign:
            raise TrainingError(f"{foreign}; train under another run name, or delete {self.directory} to begin anew")
        return None

    def save(self, progress: Progress, state: Mapping[str, Tensor]) -> None:
        """Write a checkpoint over the older one, or over the one of the same step.

        Raises:
            StorageError: The disk is full or refuses; the newest checkpoint is as it was.
        """
        steps = {name: self._worth(header) for name, header in self._headers().items()}
        target = self.directory / min(SLOTS, key=lambda name: (steps[name] != progress.step, steps[name]))
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        header = {"format": FORMAT, "progress": asdict(progress), "run": self.run, "tensors": digest_of(state)}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
            _write(target, state, {_HEADER: canonical_json(header).decode()})
        except (OSError, SafetensorError) as error:
            self._sweep()
            last = max(steps.values())
            kept = f"the checkpoint of step {last} is intact" if last >= 0 else "there is no checkpoint yet"
            raise StorageError(
                f"cannot write the checkpoint of step {progress.step} to {self.directory} ({error}): free space or fix "
                f"its permissions, then run again under the same name; {kept}"
            ) from error
        log.info("checkpoint.saved", step=progress.step, file=target.name, size_bytes=target.stat().st_size)
        if self.mirror:
            self.mirror.save(target)

    def _headers(self) -> dict[str, dict | None]:
        """Return slot → header; None where there is no file or none that can be read."""
        found: dict[str, dict | None] = {}
        for name in SLOTS:
            try:
                with safe_open(self.directory / name, "pt") as file:
                    found[name] = _checked(json.loads(file.metadata()[_HEADER]))
            except FileNotFoundError:
                found[name] = None
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                log.warning("checkpoint.refused", file=name, reason=f"torn or no checkpoint: {error}")
                found[name] = None
        return found

    def _worth(self, header: Mapping[str, Any] | None) -> int:
        """Return the step of a checkpoint, or below 0 what goes first: an empty place, then another run's."""
        if header is None:
            return -2
        return -1 if self._difference(header["run"]) else header["progress"]["step"]

    def _difference(self, run: Mapping[str, Any]) -> str:
        """Say what distinguishes the run of a checkpoint from this one; empty if nothing does."""
        for key in sorted({*run, *self.run}):
            if run.get(key) != self.run.get(key):
                return f"its {key} is {run.get(key)}, this run's is {self.run.get(key)}"
        return ""

    def _read(self, name: str, header: Mapping[str, Any]) -> dict[str, Tensor] | None:
        try:
            state = load_file(self.directory / name)
        except (SafetensorError, OSError) as error:
            log.warning("checkpoint.refused", file=name, reason=f"torn: {error}")
            return None
        if digest_of(state) != header["tensors"]:
            log.warning("checkpoint.refused", file=name, reason="torn: its tensors do not have the digest it names")
            return None
        return state

    def _sweep(self) -> None:
        """Remove what a killed writer left."""
        for path in self.directory.glob(".*"):
            path.unlink(missing_ok=True)


def _checked(header: dict) -> dict:
    """Return the header of a checkpoint of this format; of anything else an error that `_headers` catches."""
    if header["format"] != FORMAT or not isinstance(Progress(**header["progress"]).step, int):
        raise ValueError(f"its format is not {FORMAT}")
    return {"progress": header["progress"], "run": dict(header["run"]), "tensors": header["tensors"]}


def _write(target: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    save_file(dict(state), temporary, metadata=metadata)
    fsync_path(temporary)
    failpoint("checkpoint.before_rename")
    os.replace(temporary, target)
    fsync_path(target.parent)


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return the digest of named tensors, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(uint8).cpu().numpy())
    return digest.hexdigest()

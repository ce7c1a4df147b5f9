"""Hyper-parameters of one training run: what the trainer and its backends read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fednested_lib.errors import ConfigError
from fednested_lib.partition import Group
from tier1.training.schedule import Schedule

ADAM_BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Hyper-parameters of one training run.

    Args:
        steps: Optimiser steps of the schedule, ≥ 1.
        first_step: Steps of the schedule that earlier runs took; this one goes on from their optimiser state.
        last_step: Step after which this run ends; None: with the schedule. Beyond it the rate is that of its end.
        batch_size: Rows per step over all ranks together, ≥ 1.
        learning_rate: Peak rate of the core, and of the groups that have none of their own.
        expert_learning_rate: Peak rate of the experts.
        router_learning_rate: Peak rate of the router.
        schedule: How the rates go from step to step.
        weight_decay: Of matrices; norms are not decayed.
        aux_loss: Coefficient c_aux of the router balancing loss.
        grad_clip: Largest global gradient norm.
        seed: Of the order of the rows, and of the random numbers of every step.
        micro_batch: Rows that a rank passes through the model at a time, ≥ 1; None is its whole share. The gradient is
            summed over the passes; the balancing loss is then that of each pass over all ranks, not of the batch.
        activation_checkpointing: Keep no activations within a layer, but compute them again on the way back.
        document_end: Id of the end-of-text token, at which a packed row stops looking back; None: rows are read across
            documents.
        mixture: Dataset name → relative weight, > 0, of its rows among those that the run takes; None: every row once,
            then again, so that a dataset weighs what it has.
        threads: CPU threads per rank; part of the numeric profile. More than one pays only on idle cores (OpenMP
            threads spin while they wait: set OMP_WAIT_POLICY=PASSIVE where other processes compete).
    """

    steps: int
    first_step: int = 0
    last_step: int | None = None
    batch_size: int = 8
    learning_rate: float = 3e-3
    expert_learning_rate: float | None = None
    router_learning_rate: float | None = None
    schedule: Schedule = field(default_factory=Schedule)
    weight_decay: float = 0.1
    aux_loss: float = 0.02
    grad_clip: float = 1.0
    seed: int = 0
    micro_batch: int | None = None
    activation_checkpointing: bool = False
    document_end: int | None = None
    mixture: Mapping[str, float] | None = None
    threads: int = 1

    @property
    def end(self) -> int:
        """Step after which this run ends."""
        return self.steps if self.last_step is None else self.last_step

    def factor(self, step: int) -> float:
        """Return the schedule's factor on the peak rates at ``step``, from 1."""
        return self.schedule.factor(step, self.steps)

    def rate_of(self, group: Group) -> float:
        """Return the peak learning rate of one parameter group."""
        own = {"core": None, "router": self.router_learning_rate, "experts": self.expert_learning_rate}[group]
        return self.learning_rate if own is None else own

    def rows_per_pass(self, world_size: int) -> int:
        """Return how many rows a rank passes through the model at a time.

        Raises:
            ConfigError: They do not divide a rank's share of the batch.
        """
        share = self.batch_size // world_size
        rows = min(self.micro_batch or share, share)
        if share % rows:
            fitting = [k for k in range(1, share + 1) if share % k == 0]
            raise ConfigError(
                f"core.micro_batch must divide the {share} rows that each of {world_size} rank(s) takes of a batch, "
                f"got {rows}: set it to {max(k for k in fitting if k < rows)} or {min(k for k in fitting if k > rows)}"
            )
        return rows

    def passes(self, world_size: int) -> int:
        """Return through how many passes a rank's share of a batch goes.

        Raises:
            ConfigError: See `rows_per_pass`.
        """
        return self.batch_size // world_size // self.rows_per_pass(world_size)

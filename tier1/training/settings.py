"""Hyper-parameters of one training run: what the trainer and its backends read."""

from __future__ import annotations

from dataclasses import dataclass

from fednested_lib.partition import Group


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Hyper-parameters of one training run.

    Args:
        steps: Optimiser steps of the schedule, ≥ 1.
        first_step: Steps of the schedule that earlier runs took; this one goes on from their optimiser state.
        last_step: Step after which this run ends; None: with the schedule. Beyond it the rate stays at its end.
        batch_size: Rows per step over all ranks together, ≥ 1.
        learning_rate: Peak rate of the core, and of the groups that have none of their own.
        expert_learning_rate: Peak rate of the experts.
        router_learning_rate: Peak rate of the router.
        warmup: Share of the steps with a rising rate, 0..1.
        weight_decay: Of matrices; norms are not decayed.
        aux_loss: Coefficient c_aux of the router balancing loss.
        grad_clip: Largest global gradient norm.
        seed: Of the order of the rows, and of the random numbers of every step.
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
    warmup: float = 0.05
    weight_decay: float = 0.1
    aux_loss: float = 0.02
    grad_clip: float = 1.0
    seed: int = 0
    threads: int = 1

    @property
    def end(self) -> int:
        """Step after which this run ends."""
        return self.steps if self.last_step is None else self.last_step

    def rate_of(self, group: Group) -> float:
        """Return the peak learning rate of one parameter group."""
        own = {"core": None, "router": self.router_learning_rate, "experts": self.expert_learning_rate}[group]
        return self.learning_rate if own is None else own

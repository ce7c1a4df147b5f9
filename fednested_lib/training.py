"""Local training: several AdamW steps on the adapters of a frozen snapshot, and the loss that tells what it did.

    min_{A,B} −(1/T)·Σ_t log p(x_t | x_<t ; W + (α/r)·B·A)

Everything random comes from the seed, everything parallel is switched off while it runs, and the model stays in
evaluation mode (no dropout, no router jitter): the same snapshot, rows and seed give the same bits in every process on
this machine, so a device that was killed makes the same update again. Several steps per update, never one: the update
of a single SGD step is a gradient, from which text can be read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fednested_lib.errors import TrainingError

if TYPE_CHECKING:
    from fednested_lib.adapters import RoutedAdapters
    from fednested_lib.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a local training did.

    Args:
        loss_first: nats per token of the first batch, before any step.
        loss_last: nats per token of the last batch, before its step.
        tokens: predicted tokens, repetitions included.
        examples: rows given.
    """

    loss_first: float
    loss_last: float
    tokens: int
    examples: int


@contextmanager
def deterministic() -> Iterator[None]:
    """One thread and deterministic kernels inside, the caller's settings again afterwards."""
    threads, strict, warn = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict, warn_only=warn)


def _nats(model: nn.Module, rows: np.ndarray, reduction: str) -> Tensor:
    batch = torch.from_numpy(rows.astype(np.int64)).to(model.device)
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction=reduction)


def _batches(n_rows: int, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yield row numbers of each step: epochs in fresh random order, laid end to end."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    queue = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(queue) < batch_size:
            queue = np.concatenate([queue, rng.permutation(n_rows)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def _gradient(model: nn.Module, rows: np.ndarray, micro_batch_size: int) -> float:
    """Add the gradient of the mean loss of rows, part by part; returns the loss."""
    total = 0.0
    for start in range(0, len(rows), micro_batch_size):
        part = rows[start : start + micro_batch_size]
        loss = _nats(model, part, "mean") * (len(part) / len(rows))
        total += float(loss.detach())
        loss.backward()
    return total


def train_adapters(
    model: nn.Module,
    adapters: RoutedAdapters,
    tokens: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    micro_batch_size: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> TrainReport:
    """Train attached adapters in place.

    Args:
        model: frozen snapshot with `adapters` attached.
        adapters: what is trained; reset it first.
        tokens: int32 [n, seq_len + 1] rows (see `text.pack`).
        steps: AdamW steps, ≥ 1; without weight decay, which would pull A towards zero and says nothing about the data.
        batch_size: rows per step; rows repeat when there are fewer.
        learning_rate: constant.
        seed: of the order of rows, 0 ≤ seed < 2**128.
        micro_batch_size: most rows in memory at a time: gradients of a step are summed over such parts. The same
            gradient but for fp32 rounding.
        on_step: called with (step, nats per token) after each step; what it raises ends the training.
        checkpoint: where to go on from, and what to write on the way and when `on_step` ends the training. A training
            that goes on gives the same bits as one that never stopped.

    Raises:
        TrainingError: the loss is not finite; the adapters are then worthless.
    """
    assert len(tokens)
    assert steps >= 1
    parameters = list(adapters.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    reached = None if checkpoint is None else checkpoint.restore(adapters, optimizer)
    done, first, last = reached or (0, math.nan, math.nan)
    model.eval()
    with deterministic():
        for step, rows in enumerate(_batches(len(tokens), batch_size, steps, seed)):
            if step < done:
                continue
            optimizer.zero_grad(set_to_none=True)
            last = _gradient(model, tokens[rows], micro_batch_size or batch_size)
            first = last if step == 0 else first
            if not math.isfinite(last):
                raise TrainingError(
                    f"loss of step {step + 1} of {steps} is {last}, must be finite: "
                    f"lower training.learning_rate ({learning_rate})"
                )
            optimizer.step()
            if checkpoint is not None and checkpoint.due(step + 1) and step + 1 < steps:
                checkpoint.save(step + 1, first, last, adapters, optimizer)
            if on_step is not None:
                try:
                    on_step(step, last)
                except Exception:
                    if checkpoint is not None:
                        checkpoint.save(step + 1, first, last, adapters, optimizer)
                    raise
    return TrainReport(
        loss_first=first,
        loss_last=last,
        tokens=steps * batch_size * (tokens.shape[1] - 1),
        examples=len(tokens),
    )


def mean_loss(model: nn.Module, tokens: np.ndarray, batch_size: int = 16) -> tuple[float, int]:
    """Return (nats per token, number of tokens) of rows, whatever the batch size: Σ nats / Σ tokens.

    Args:
        model: any causal language model; it is put into evaluation mode.
        tokens: int32 [n, seq_len + 1].
        batch_size: rows at a time; memory only.

    Raises:
        TrainingError: the loss is not finite.
    """
    assert len(tokens)
    model.eval()
    total, n_tokens = 0.0, len(tokens) * (tokens.shape[1] - 1)
    with deterministic(), torch.inference_mode():
        for start in range(0, len(tokens), batch_size):
            per_token = _nats(model, tokens[start : start + batch_size], "none")
            total += float(per_token.double().sum())
    if not math.isfinite(total):
        raise TrainingError(
            f"loss over {n_tokens} tokens is {total / n_tokens}, must be finite: "
            "the model is broken, restore the snapshot"
        )
    return total / n_tokens, n_tokens

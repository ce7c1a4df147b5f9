"""Train core, router and experts together: next-token loss, router balancing, AdamW with one rate per group.

    θ_g ← AdamW(θ_g, ∇L, η_g · schedule(step)),  g ∈ {core, router, experts}     (arXiv:1711.05101)

How a step is computed is the backend's, the rate of a step the schedule's; the loop, the order of the rows, the
checkpoints and the stop on a bad loss are here, the same on one process and on n ranks.

Rows and random numbers of a step are functions of seed and step (and rank), so a run that goes on from a checkpoint
ends with the bits of one that was never interrupted, on the same number of ranks and threads. On another number it goes
on as well, equal up to the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from fednested_lib.errors import DataError, TrainingError
from fednested_lib.failpoints import failpoint
from fednested_lib.partition import group_of
from tier1.training.backends import WEIGHTS, Backend, TorchBackend
from tier1.training.checkpoint import Checkpoints, Found, Progress
from tier1.training.meter import Meter
from tier1.training.mixture import mixed_rows
from tier1.training.ranks import ALONE, Ranks
from tier1.training.settings import TrainSettings
from tier1.training.step_metrics import StepMetrics, StepRecorder

log = structlog.get_logger()

NAMED_ROWS = 16
CHECKED_ROWS = 65_536
OnStep = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run did; losses are next-token cross-entropies of training batches, nats per token."""

    loss_first: float
    loss_last: float
    steps: int
    tokens: int


def train(
    model: nn.Module,
    tokens: np.ndarray,
    settings: TrainSettings,
    *,
    family: str,
    sources: Mapping[str, range] | None = None,
    backend: Backend | None = None,
    ranks: Ranks = ALONE,
    moments: Mapping[str, Tensor] | None = None,
    checkpoints: Checkpoints | None = None,
    on_step: OnStep | None = None,
    metrics: StepMetrics | None = None,
) -> TrainReport:
    """Train ``model`` on packed rows; the same arguments give the same weights on one numeric profile.

    Args:
        model: Transformers MoE model, equal on all ranks; the default backend trains it in place.
        tokens: Integer [n_rows, seq_len + 1], equal on all ranks.
        settings: Hyper-parameters.
        family: Model family, a key of the partition rules.
        sources: Dataset name → its rows; needed with ``settings.mixture``.
        backend: Engine; plain torch by default.
        ranks: Those that share the batches; every rank calls.
        moments: What the backend's ``training_state`` was at ``settings.first_step``, if that is not 0; the weights
            in it are not used. Rank 0 passes it.
        checkpoints: Where to go on from, and where rank 0 saves; None is off.
        on_step: Called with step number (from 1) and loss after each step.
        metrics: What is measured of the steps, and how often; None is off.

    Raises:
        TrainingError: Loss or gradient is not finite (the weights are those after the last good step), memory does not
            suffice, or the checkpoints are another run's.
        DataError: There is no row, or one with a token that the model does not have, or a dataset of the mixture has
            no row.
        ConfigError: The batch does not divide among the ranks.
        StorageError: A checkpoint cannot be written; the one before it is intact.
        TransportError: Another rank is gone.
    """
    if len(tokens) < 1:
        raise DataError("number of token rows must be at least 1, got 0: add text")
    share, order = ranks.share_of(settings.batch_size), batches(len(tokens), settings, sources)
    _check_vocabulary(tokens, model.config.vocab_size)
    backend, meter = backend or TorchBackend(), Meter(model, family, ranks, metrics and metrics.peak_flops)
    recorder = StepRecorder(metrics, model, meter, ranks)
    progress = Progress(step=settings.first_step)
    with memory_named("before the first step", ranks, backend.memory_remedy):
        backend.prepare(model, settings, family, ranks)
        if settings.first_step:
            _continue(backend, ranks, moments)
        progress = _resume(backend, ranks, checkpoints, progress) if checkpoints else progress
    meter = meter.again()
    with _numeric_profile(settings.threads, ranks.device), closing(recorder):
        for step, chosen in islice(enumerate(order, start=1), progress.step, None):
            torch.manual_seed(_seed_of(settings.seed, step, ranks.rank))
            rows = torch.from_numpy(tokens[chosen[share]].astype(np.int64))
            recorder.before(step)
            with memory_named(*_at(step, settings, ranks, backend)):
                loss = backend.step(rows, rate=settings.factor(step))
            if not math.isfinite(loss):
                raise TrainingError(_not_finite(step, chosen, settings, checkpoints))
            n_tokens = rows[:, 1:].numel() * ranks.world_size
            meter.count(n_tokens)
            recorder.after(step, settings, loss=loss, grad_norm=backend.grad_norm(), tokens=n_tokens)
            first = loss if step == settings.first_step + 1 else progress.loss_first
            progress = Progress(step=step, loss_first=first, loss_last=loss)
            if on_step:
                on_step(step, loss)
            if checkpoints and step % checkpoints.every == 0 and step < settings.end:
                _save(backend, ranks, checkpoints, progress)
            failpoint("core.after_step")
    if ranks.rank == 0:
        log.info(
            "core.trained",
            steps=progress.step - settings.first_step,
            loss_first=round(progress.loss_first, 4),
            loss_last=round(progress.loss_last, 4),
            mixture=settings.mixture,
            **asdict(meter.read()),
        )
    return TrainReport(
        loss_first=progress.loss_first,
        loss_last=progress.loss_last,
        steps=progress.step - settings.first_step,
        tokens=(progress.step - settings.first_step) * settings.batch_size * (tokens.shape[1] - 1),
    )


def _continue(backend: Backend, ranks: Ranks, moments: Mapping[str, Tensor] | None) -> None:
    """Give the prepared weights the optimiser state of an earlier run, which rank 0 has."""
    weights = {WEIGHTS + name: tensor for name, tensor in backend.state_dict().items()}
    backend.load_training_state(ranks.share(None if moments is None else {**moments, **weights}))


def _check_vocabulary(tokens: np.ndarray, vocab_size: int) -> None:
    """Refuse rows of another tokenizer, which would end in an index error deep in the model."""
    for start in range(0, len(tokens), CHECKED_ROWS):  # the rows may be more than memory holds
        top = int(tokens[start : start + CHECKED_ROWS].max())
        if top >= vocab_size:
            raise DataError(
                f"token ids must be below the model's vocabulary of {vocab_size}, got {top} in the packed data: it was "
                "packed with another tokenizer; pack it with the one of the version that is trained"
            )


def _resume(backend: Backend, ranks: Ranks, checkpoints: Checkpoints, begin: Progress) -> Progress:
    """Load the newest checkpoint of rank 0 on all ranks and return how far it is; `begin` if there is none."""
    found: list[Found] = []

    def read() -> dict | None:
        newest = checkpoints.newest()
        found.extend([newest] if newest else [])
        return asdict(newest.progress) if newest else None

    progress = ranks.first(read)
    if progress is None:
        return begin
    backend.load_training_state(ranks.share(found[0].state if found else None))
    log.info("core.resumed", step=progress["step"], rank=ranks.rank)
    return Progress(**progress)


def _save(backend: Backend, ranks: Ranks, checkpoints: Checkpoints, progress: Progress) -> None:
    state = backend.training_state()
    ranks.first(lambda: checkpoints.save(progress, state))


def _not_finite(step: int, chosen: np.ndarray, settings: TrainSettings, checkpoints: Checkpoints | None) -> str:
    rows = ", ".join(map(str, chosen[:NAMED_ROWS])) + (", …" if len(chosen) > NAMED_ROWS else "")
    last = (step - 1) // checkpoints.every * checkpoints.every if checkpoints else 0
    kept = f"the checkpoint of step {last} is intact" if last > settings.first_step else "there is no checkpoint yet"
    # Another rate is another run, which no checkpoint of this one may go on in.
    return (
        f"loss or gradient at step {step} of {settings.end} is not finite (rows {rows} of the packed data, learning "
        f"rate {settings.learning_rate:g}): lower core.learning_rate and train under another run name; {kept}"
    )


@contextmanager
def memory_named(when: str, ranks: Ranks, remedy: str) -> Iterator[None]:
    """Say what to do where memory does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not (said or any(words in str(error) for words in ("allocate memory", "out of memory"))):
            raise
        raise TrainingError(
            f"memory of rank {ranks.rank} ({ranks.device}) does not suffice {when}: {remedy}, or train on more ranks; "
            "then run again under its name"
        ) from error


def _at(step: int, settings: TrainSettings, ranks: Ranks, backend: Backend) -> tuple[str, Ranks, str]:
    """Return what `memory_named` says of a step: the micro-batch to try."""
    rows = settings.rows_per_pass(ranks.world_size)
    smaller = [k for k in range(1, rows) if settings.batch_size // ranks.world_size % k == 0]
    remedy = f"set core.micro_batch to {smaller[-1]}" if smaller else backend.memory_remedy
    return f"for step {step} with {rows} rows per pass", ranks, f"{remedy}, core.activation_checkpointing to true"


def batches(n_rows: int, settings: TrainSettings, sources: Mapping[str, range] | None = None) -> Iterator[np.ndarray]:
    """Return an iterator over the row numbers of all batches to the run's end.

    Raises:
        DataError: A dataset of the mixture has no row.
    """
    if settings.mixture is None:
        return _shuffled(n_rows, settings)
    rows = mixed_rows(settings.mixture, sources or {}, settings.seed)
    return (np.fromiter(islice(rows, settings.batch_size), np.int64) for _ in range(settings.end))


def _shuffled(n_rows: int, settings: TrainSettings) -> Iterator[np.ndarray]:
    """Yield batches in which every row is used once before any is used again."""
    rng = np.random.Generator(np.random.Philox(settings.seed))
    order = np.empty(0, np.int64)
    for _ in range(settings.end):
        while len(order) < settings.batch_size:
            order = np.concatenate([order, rng.permutation(n_rows)])
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        yield chosen


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's random numbers (dropout, router noise), of which no two are related."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def dense_delta(before: dict[str, Tensor], after: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Return local − base of every parameter, in fp32; it is added with +η.

    Raises:
        PartitionError: A parameter that no rule of ``family`` names.
    """
    assert before.keys() == after.keys(), "both states belong to one model"
    for name in before:
        group_of(name, family)
    return {name: after[name].float() - before[name].float() for name in before}


@contextmanager
def _numeric_profile(threads: int, device: str) -> Iterator[None]:
    """Fix the number of threads and refuse non-deterministic kernels; restore both, and random numbers, afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[] if device == "cpu" else [device]):
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])

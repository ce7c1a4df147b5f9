"""The slow loop's work: train core and experts on tier-1 text and keep the difference as an input of the fold.

    ΔW = W_trained − W_base,    later: W_core ← W_core + η_core · ΔW_core,  W_experts ← W_experts + η_T1 · ΔW_experts

Training is not replayed: its delta is archived slice by slice, named by digest, and folded into whatever head is when
training is done. Nothing here knows the chain or the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import structlog
from torch import Tensor

from fednested_lib.blobs import BlobStore
from fednested_lib.signing import canonical_json
from fednested_lib.snapshot import (
    SnapshotManifest,
    build_model,
    encode_blob,
    read_state_dict,
    slice_state_dict,
    write_state_dict,
)
from tier1.evaluation.suites import evenly_spaced
from tier1.training.backends import OPTIMIZER, Backend, TorchBackend
from tier1.training.checkpoint import Checkpoints, digest_of
from tier1.training.data import PackedDataset
from tier1.training.deepspeed_backend import DeepSpeedBackend
from tier1.training.lora import LoraBackend
from tier1.training.pace import COLLECTED
from tier1.training.ranks import ALONE, Ranks
from tier1.training.safeguarded import safeguarded
from tier1.training.safeguards import Memory, Safeguards, fisher_diagonal
from tier1.training.settings import TrainSettings
from tier1.training.step_metrics import StepMetrics
from tier1.training.trainer import OnStep, TrainReport, dense_delta, memory_named, train

log = structlog.get_logger()

_HOW = {"threads", "micro_batch", "activation_checkpointing"}
_SINCE = {"document_end", "mixture"}  # None is not said: checkpoints from before there was such a setting go on


@dataclass(frozen=True, kw_only=True)
class DenseDelta:
    """The delta of one training run, by claim check.

    Args:
        base_version: Version of the snapshot that training started from.
        base_digest: Its digest.
        blobs: Slice key → digest of the difference, fp32 or fp16; a slice that did not change is absent.
        dataset_digest: Content hash of what it was trained on.
        report: Losses, steps and tokens.
        last_step: Step of the schedule that the run ended with.
        state: What the next run of the same cluster may go on from, the backend's training state; None: not asked for.
        fisher: Slice key → digest of the Fisher information of this run; with EWC.
        fisher_decay: What that of the runs before it still counts.
    """

    base_version: int
    base_digest: str
    blobs: Mapping[str, str]
    dataset_digest: str
    report: TrainReport
    last_step: int
    state: Mapping[str, Tensor] | None = field(default=None, repr=False)
    fisher: Mapping[str, str] = field(default_factory=dict)
    fisher_decay: float = 1.0


def train_core_update(
    base: SnapshotManifest,
    snapshots: BlobStore,
    dataset: PackedDataset,
    settings: TrainSettings,
    deltas: BlobStore,
    *,
    backend: Backend | None = None,
    ranks: Ranks = ALONE,
    moments: Mapping[str, Tensor] | None = None,
    keep_state: bool = False,
    dtype: str = "float32",
    checkpoints: Checkpoints | None = None,
    on_step: OnStep | None = None,
    metrics: StepMetrics | None = None,
    safeguards: Safeguards | None = None,
    memory: Memory | None = None,
) -> DenseDelta:
    """Train from ``base`` and store the difference; every rank calls and gets the same answer, rank 0 stores.

    Args:
        base: Snapshot to start from.
        snapshots: Holds its blobs.
        dataset: Packed tier-1 text.
        settings: Hyper-parameters.
        deltas: Receives one blob per changed slice, cut as a snapshot is.
        backend: Engine; plain torch by default.
        ranks: Those that train together.
        moments: Optimiser state of the run before, where ``settings.first_step`` is not 0 (see ``train``).
        keep_state: Return the training state as well.
        dtype: Of the stored difference, ``float32`` or ``float16``.
        checkpoints: Where the run goes on from and saves; what the run is, is added here. None is off.
        on_step: Called with step number (from 1) and loss after each step.
        metrics: What is measured of the steps, and how often; None is off.
        safeguards: Against forgetting; part of what the run is. None: there are none.
        memory: What they protect.

    Raises:
        SnapshotError: A blob of ``base`` is missing or corrupt.
        TrainingError: Loss or gradient is not finite, memory does not suffice, or the checkpoints are another run's;
            no delta is stored.
        StorageError: ``deltas``, or a checkpoint, cannot be written.
        ConfigError: The batch does not divide among the ranks, or ``backend`` does not go with the safeguards.
        TransportError: Another rank is gone.
    """
    memory = memory or Memory()
    backend = safeguarded(safeguards, memory, backend) if safeguards else backend or TorchBackend()
    model = build_model(base, snapshots)
    if checkpoints:
        checkpoints = replace(checkpoints, run=_identity(base, dataset, settings) | _guarded(safeguards, memory))
        checkpoints = replace(checkpoints, run={**checkpoints.run, **_adapted(backend), **_begun(backend, moments)})
    if moments:
        slow = safeguards and safeguards.frequencies and safeguards.frequencies.slow(model, base.family)
        _tell_dropped(moments, slow or set())
    report = train(
        model,
        dataset.tokens(),
        settings,
        family=base.family,
        sources=dataset.sources,
        backend=backend,
        ranks=ranks,
        moments=moments,
        checkpoints=checkpoints,
        on_step=on_step,
        metrics=metrics,
    )
    after = backend.state_dict()
    exact = backend.delta() if isinstance(backend, LoraBackend) else {}
    with memory_named("for the Fisher information of core.safeguards.ewc", ranks, backend.memory_remedy):
        fisher = _fisher(base, snapshots, after, dataset, settings, safeguards, ranks, deltas)
    blobs = ranks.first(lambda: _store(base, read_state_dict(base, snapshots), after, exact, deltas, dtype))
    return DenseDelta(
        base_version=base.version,
        base_digest=base.digest,
        blobs=blobs,
        dataset_digest=dataset.digest,
        report=report,
        last_step=settings.end,
        state=backend.training_state() if keep_state else None,
        **fisher,
    )


def _fisher(
    base: SnapshotManifest,
    snapshots: BlobStore,
    after: dict[str, Tensor],
    dataset: PackedDataset,
    settings: TrainSettings,
    safeguards: Safeguards | None,
    ranks: Ranks,
    deltas: BlobStore,
) -> dict[str, Any]:
    """Store what later runs must not move much, at the weights that this one ended with; every rank has a share."""
    if not (safeguards and safeguards.ewc):
        return {}
    model = build_model(base, snapshots).to(ranks.device)  # an engine may have cut the one that was trained
    missing, _ = model.load_state_dict(after, strict=False)  # DeepSpeed names tied weights once
    assert not set(missing) & dict(model.named_parameters()).keys(), "the state has every weight"
    tokens = dataset.tokens()
    rows = tokens[evenly_spaced(len(tokens), safeguards.ewc.rows)]
    own = fisher_diagonal(model, rows, ranks, settings.document_end)
    blobs = ranks.first(lambda: write_state_dict(own, base.family, deltas))
    return {"fisher": blobs, "fisher_decay": safeguards.ewc.decay}


def _store(
    base: SnapshotManifest,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    exact: dict[str, Tensor],
    deltas: BlobStore,
    dtype: str,
) -> dict[str, str]:
    # A tied head is in the model's state under two names, in the snapshot under one. Where the change itself is known,
    # the rounding of weights is not part of it.
    delta = dense_delta(before, {name: after[name] for name in before}, base.family) | exact
    return {
        key: deltas.put(encode_blob({name: array.astype(dtype) for name, array in tensors.items()}))
        for key, tensors in slice_state_dict(delta, base.family)
        if any(array.any() for array in tensors.values())
    }


def _identity(base: SnapshotManifest, dataset: PackedDataset, settings: TrainSettings) -> dict:
    """Say what a run is: whoever goes on from its checkpoints must do the same.

    Threads, ranks, engine (but for its precision), micro-batch and what is kept of activations may differ: they are
    how, not what.
    """
    what = {key: value for key, value in asdict(settings).items() if key not in _HOW}
    parameters = {f"settings.{key}": value for key, value in what.items() if value is not None or key not in _SINCE}
    return {"base_digest": base.digest, "dataset_digest": dataset.digest, **parameters}


def _adapted(backend: Backend) -> dict:
    """Say what is trained in place of the weights; other engines are how, not what."""
    settings = asdict(backend.settings) if isinstance(backend, LoraBackend) else {}
    return {f"lora.{key}": canonical_json(value).decode() for key, value in settings.items()}


def _begun(backend: Backend, moments: Mapping[str, Tensor] | None) -> dict:
    """Say in which precision a run computes and whose moments it took over, where it is not fp32 and nobody's."""
    bf16 = {"deepspeed.bf16": True} if isinstance(backend, DeepSpeedBackend) and backend.chosen.bf16 else {}
    taken = {name: tensor for name, tensor in (moments or {}).items() if name.startswith(OPTIMIZER)}
    return {**bf16, "moments": digest_of(taken)} if taken else bf16


def _tell_dropped(moments: Mapping[str, Tensor], slow: set[str]) -> None:
    """Say of how many parameters the gradients that the run before had collected are in no move of this one."""
    prefix = f"{OPTIMIZER}{COLLECTED}."
    collected = {name.removeprefix(prefix) for name, held in moments.items() if name.startswith(prefix) and held.any()}
    if dropped := collected - slow:
        log.warning("core.collected_dropped", parameters=len(dropped))


def _guarded(safeguards: Safeguards | None, memory: Memory) -> dict:
    """Say what protects a run, and what it protects."""
    if safeguards is None:
        return {}
    parts = {f"safeguards.{k}": canonical_json(part).decode() for k, part in asdict(safeguards).items() if part}
    return {**parts, "safeguards.memory": memory.digest}

"""The slow loop's work: train core and experts on tier-1 text and keep the difference as an input of the fold.

    ΔW = W_trained − W_base,    later: W_core ← W_core + η_core · ΔW_core,  W_experts ← W_experts + η_T1 · ΔW_experts

Training is not replayed: its delta is archived slice by slice, named by digest, and folded into whatever head is when
training is done. Nothing here knows the chain or the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor, nn

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ConfigError
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
from tier1.training.backends import Backend, TorchBackend
from tier1.training.checkpoint import Checkpoints
from tier1.training.data import PackedDataset
from tier1.training.ranks import ALONE, Ranks
from tier1.training.safeguarded import SafeguardedBackend
from tier1.training.safeguards import Memory, Safeguards, accumulated, fisher_diagonal
from tier1.training.settings import TrainSettings
from tier1.training.trainer import OnStep, TrainReport, dense_delta, train

_HOW = {"threads", "micro_batch", "activation_checkpointing"}


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
        fisher: Slice key → digest of the Fisher information that protects all runs so far; with EWC.
    """

    base_version: int
    base_digest: str
    blobs: Mapping[str, str]
    dataset_digest: str
    report: TrainReport
    last_step: int
    state: Mapping[str, Tensor] | None = field(default=None, repr=False)
    fisher: Mapping[str, str] = field(default_factory=dict)


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
        safeguards: Against forgetting, with the default backend; part of what the run is. None: there are none.
        memory: What they protect.

    Raises:
        SnapshotError: A blob of ``base`` is missing or corrupt.
        TrainingError: Loss or gradient is not finite, or the checkpoints are another run's; no delta is stored.
        StorageError: ``deltas``, or a checkpoint, cannot be written.
        ConfigError: The batch does not divide among the ranks, or another engine has no safeguards.
        TransportError: Another rank is gone.
    """
    if backend and safeguards:
        raise ConfigError("core.safeguards must be off with another engine than plain torch: remove it or the engine")
    memory = memory or Memory()
    backend = backend or (SafeguardedBackend(safeguards, memory) if safeguards else TorchBackend())
    model = build_model(base, snapshots)
    if checkpoints:
        checkpoints = replace(checkpoints, run=_identity(base, dataset, settings) | _guarded(safeguards, memory))
    report = train(
        model,
        dataset.tokens(),
        settings,
        family=base.family,
        backend=backend,
        ranks=ranks,
        moments=moments,
        checkpoints=checkpoints,
        on_step=on_step,
    )
    after = backend.state_dict()
    blobs = ranks.first(lambda: _store(base, read_state_dict(base, snapshots), after, deltas, dtype))
    return DenseDelta(
        base_version=base.version,
        base_digest=base.digest,
        blobs=blobs,
        dataset_digest=dataset.digest,
        report=report,
        last_step=settings.end,
        state=backend.training_state() if keep_state else None,
        fisher=ranks.first(lambda: _store_fisher(model, after, base, dataset, safeguards, memory, deltas)),
    )


def _store_fisher(
    model: nn.Module,
    after: dict[str, Tensor],
    base: SnapshotManifest,
    dataset: PackedDataset,
    safeguards: Safeguards | None,
    memory: Memory,
    deltas: BlobStore,
) -> dict[str, str]:
    """Store what the next run must not move much: the earlier runs' Fisher information and this one's."""
    if not (safeguards and safeguards.ewc):
        return {}
    model.load_state_dict(after)
    tokens = dataset.tokens()
    own = fisher_diagonal(model, tokens[evenly_spaced(len(tokens), safeguards.ewc.rows)])
    return write_state_dict(accumulated(memory.fisher, own, safeguards.ewc.decay), base.family, deltas)


def _store(
    base: SnapshotManifest, before: dict[str, Tensor], after: dict[str, Tensor], deltas: BlobStore, dtype: str
) -> dict[str, str]:
    # A tied head is in the model's state under two names, in the snapshot under one.
    delta = dense_delta(before, {name: after[name] for name in before}, base.family)
    return {
        key: deltas.put(encode_blob({name: array.astype(dtype) for name, array in tensors.items()}))
        for key, tensors in slice_state_dict(delta, base.family)
        if any(array.any() for array in tensors.values())
    }


def _identity(base: SnapshotManifest, dataset: PackedDataset, settings: TrainSettings) -> dict:
    """Say what a run is: whoever goes on from its checkpoints must do the same.

    Threads, ranks, engine, micro-batch and what is kept of activations may differ: they are how, not what.
    """
    parameters = {f"settings.{key}": value for key, value in asdict(settings).items() if key not in _HOW}
    return {"base_digest": base.digest, "dataset_digest": dataset.digest, **parameters}


def _guarded(safeguards: Safeguards | None, memory: Memory) -> dict:
    """Say what protects a run, and what it protects."""
    if safeguards is None:
        return {}
    parts = {f"safeguards.{k}": canonical_json(part).decode() for k, part in asdict(safeguards).items() if part}
    return {**parts, "safeguards.memory": memory.digest}

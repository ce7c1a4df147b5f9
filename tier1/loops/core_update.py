"""The slow loop, step by step: authorise, pack, train, fold.

    W_core ← W_core + η_core·ΔW_core,    W_experts ← W_experts + η_T1·ΔW_experts

Training takes hours while the fast loop moves head on, so its delta is published like any other update, signed and with
the base it was trained on, and folded into whatever head is then. A run that died is started again under its own name
and goes on where its last durable step ended: published, trained, or its newest checkpoint. On several ranks each calls
`train_delta`; rank 0 alone chooses the base, writes and publishes.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from fednested_lib.blobs import write_durable
from fednested_lib.errors import ChainError, LogError
from fednested_lib.failpoints import failpoint
from fednested_lib.log import DENSE
from fednested_lib.signing import canonical_json, sha256_hex
from tier1.config import OPTIMISER
from tier1.federation import Federation
from tier1.loops.core_round import (
    begin_schedule,
    candidate_ref,
    fold_round,
    folded_elsewhere,
    gather_round,
    keep_state,
)
from tier1.loops.genesis import ensure_genesis
from tier1.loops.memory import authorise_datasets, chosen_safeguards, memory_of, rehearsed_datasets
from tier1.loops.records import CandidateRef, DenseRef, PackedData, TrainingGrant
from tier1.loops.run_metrics import SUFFIX, metrics_writer, show_runs
from tier1.training.ranks import ALONE, Ranks
from tier1.versions.candidates import save_candidate
from tier1.versions.dense_update import make_dense
from tier1.versions.manifest import DenseInput, DenseUpdate

if TYPE_CHECKING:
    from tier1.training.backends import Backend
    from tier1.training.checkpoint import Checkpoints, Found, Mirror
    from tier1.training.core_update import DenseDelta
    from tier1.training.deepspeed_config import DeepSpeedSettings
    from tier1.training.step_metrics import StepMetrics

log = structlog.get_logger()


def authorise_training(fed: Federation, run_id: str) -> TrainingGrant:
    """Ask the policy whether the trainer may train on every governed dataset, those of old domains included.

    Raises:
        PolicyDenied: it may not, or the policy cannot decide.
    """
    names = sorted({*fed.config.core.datasets, *rehearsed_datasets(fed)})
    decisions = authorise_datasets(fed, names)
    log.info("core_update.authorised", run=run_id, datasets=names)
    return TrainingGrant(decision_id=sha256_hex(canonical_json(decisions)), datasets=names)


def pack_datasets(fed: Federation, grant: TrainingGrant) -> PackedData:
    """Validate and pack the granted datasets; bad records are set aside with file, line and reason.

    Raises:
        ConfigError: `core.seq_len` is more than the positions of the model.
        DataError: a dataset is unusable.
    """
    from tier1.training.data import prepare_dataset
    from tier1.training.model import check_positions

    head = ensure_genesis(fed).head
    check_positions(fed.config.core.seq_len, head.model)
    sources = {name: path for name, path in fed.config.core.datasets.items() if name in grant.datasets}
    core, out_dir = fed.config.core, fed.home / "packed"
    packed = prepare_dataset(
        sources, fed.blobs.get(head.tokenizer), seq_len=core.seq_len, out_dir=out_dir, dedupe=core.dedupe
    )
    log.info(
        "core_update.packed",
        rows=packed.n_rows,
        tokens=packed.n_tokens,
        set_aside=packed.n_set_aside,
        duplicates=dict(packed.duplicates),
    )
    return PackedData(
        digest=packed.digest,
        path=str(packed.path),
        n_rows=packed.n_rows,
        n_tokens=packed.n_tokens,
        n_set_aside=packed.n_set_aside,
        sources={name: [rows.start, rows.stop] for name, rows in packed.sources.items()},
    )


def train_delta(
    fed: Federation,
    data: PackedData,
    run_id: str,
    base_version: int | None = None,
    *,
    ranks: Ranks = ALONE,
    mirror: Mirror | None = None,
) -> DenseRef:
    """Train from `base_version` (head when None) and publish the dense delta.

    Args:
        fed: the federation, opened by every rank.
        data: packed text.
        run_id: name of the run; a run that died goes on under it, from the base that it began with.
        base_version: version to train from.
        ranks: those that train together; each calls, and gets the same answer.
        mirror: second place for checkpoints.

    Raises:
        TrainingError: the loss is not finite, or the checkpoints under this name are another run's; nothing is
            published.
        ChainError: the chain has no such version, or the run began from another one.
        ConfigError: the batch does not divide among the ranks.
        StorageError: a checkpoint or the delta cannot be written.
        TransportError: another rank is gone, or the log does not answer.
    """
    started_ms = _now_ms()
    place = _run_path(fed, run_id, ".json")
    if not ranks.first(place.exists):
        base = ranks.first(lambda: _base_of(fed, run_id, base_version))
        delta = _train(fed, data, run_id, base, ranks, mirror)
        ranks.first(lambda: _keep(fed, delta, base, run_id, started_ms))
    published = DenseRef(**ranks.first(lambda: asdict(_publish(fed, run_id))))
    if ranks.rank == 0:
        show_runs(fed)
    return published


def _base_of(fed: Federation, run_id: str, base_version: int | None) -> int:
    """Return the version that a run trains from, which its retries keep: the checkpoints are of that base."""
    place = _run_path(fed, run_id, ".base.json")
    if place.exists():
        begun = json.loads(place.read_bytes())["base_version"]
        if base_version not in (None, begun):
            raise ChainError(
                f"base version of run {run_id} must be {begun}, from which it began, got {base_version}: "
                "leave it out or train under another run name"
            )
        return begun
    state = fed.chain.state()
    if base_version is not None and base_version not in state.versions:
        raise ChainError(
            f"base version must be 0..{max(state.versions)}, got {base_version}: see `fednested tier1 status`"
        )
    chosen = state.head.version if base_version is None else base_version
    write_durable(place, canonical_json({"base_version": chosen}))
    return chosen


def _train(
    fed: Federation, data: PackedData, run_id: str, base_version: int, ranks: Ranks, mirror: Mirror | None
) -> DenseDelta:
    from tier1.training.core_update import train_core_update
    from tier1.training.data import PackedDataset
    from tier1.training.progress import progress
    from tier1.training.settings import TrainSettings

    core, base = fed.config.core, fed.chain.state().versions[base_version]
    before: list[Found | None] = []  # rank 0 alone has it
    first = ranks.first(lambda: _begin(fed, run_id, before))
    settings = TrainSettings(
        steps=core.schedule_steps or core.steps,
        first_step=first,
        last_step=first + core.steps,
        batch_size=core.batch_size,
        learning_rate=core.learning_rate,
        **core.model_dump(include=OPTIMISER),
        schedule=core.schedule.schedule(),
        seed=core.seed,
        micro_batch=core.micro_batch,
        activation_checkpointing=core.activation_checkpointing,
        document_end=_document_end(fed.blobs.get(base.tokenizer)) if core.document_masks else None,
        mixture=core.mixture,
        threads=core.threads,
    )
    packed = PackedDataset(
        path=Path(data.path),
        digest=data.digest,
        n_rows=data.n_rows,
        n_tokens=data.n_tokens,
        n_bytes=0,
        n_set_aside=data.n_set_aside,
        sources={name: range(first, end) for name, (first, end) in data.sources.items()},
    )
    with progress(settings.end, f"core update from v{base_version}", shown=ranks.rank == 0) as on_step:
        delta = train_core_update(
            base.snapshot,
            fed.blobs,
            packed,
            settings,
            fed.archive,
            backend=_engine(core.deepspeed) or _low_rank(fed),
            ranks=ranks,
            moments=before[0].state if before and before[0] else None,
            keep_state=core.schedule_steps is not None,
            dtype=core.delta_dtype,
            checkpoints=_checkpoints(fed, run_id, mirror),
            on_step=on_step,
            metrics=_metrics(fed, run_id),
            safeguards=chosen_safeguards(fed),
            memory=memory_of(fed, base, ranks),
        )
    if ranks.rank == 0:
        log.info(
            "core_update.trained",
            run=run_id,
            ranks=ranks.world_size,
            base=base_version,
            loss_first=delta.report.loss_first,
            loss_last=delta.report.loss_last,
        )
    return delta


def _begin(fed: Federation, run_id: str, before: list[Found | None]) -> int:
    """Read what this cluster's run before has kept into `before` and return the step that it ended with."""
    before.append(begin_schedule(fed, _run_path(fed, run_id, ".base.json")))
    return before[0].progress.step if before[0] else 0


def _document_end(tokenizer: bytes) -> int:
    from fednested_lib.text import end_of_text_id, load_tokenizer

    return end_of_text_id(load_tokenizer(tokenizer))


def _engine(chosen: DeepSpeedSettings | None) -> Backend | None:
    if chosen is None:
        return None
    from tier1.training.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(chosen)


def _low_rank(fed: Federation) -> Backend | None:
    chosen = fed.config.core.lora
    if chosen is None:
        return None
    from tier1.training.lora import LoraBackend

    return LoraBackend(chosen.settings())


def _checkpoints(fed: Federation, run_id: str, mirror: Mirror | None) -> Checkpoints | None:
    from tier1.training.checkpoint import Checkpoints

    every = fed.config.core.checkpoint_every
    return Checkpoints(directory=_run_path(fed, run_id, ".checkpoints"), every=every, mirror=mirror) if every else None


def _metrics(fed: Federation, run_id: str) -> StepMetrics | None:
    from tier1.training.step_metrics import StepMetrics

    core = fed.config.core
    write = metrics_writer(_run_path(fed, run_id, SUFFIX))
    every = core.metrics_every
    return StepMetrics(every=every, write=write, peak_flops=core.peak_flops) if every else None


def _keep(fed: Federation, delta: DenseDelta, base_version: int, run_id: str, started_ms: int) -> None:
    """Sign and write down what was trained, once what the next run goes on from is kept."""
    base = fed.chain.state().versions[base_version]
    update = make_dense(
        fed.signer,
        run_id=run_id,
        base_version=base.version,
        base_digest=base.base_digest,
        blobs=dict(delta.blobs),
        steps=delta.report.steps,
        tokens=delta.report.tokens,
        dataset_digest=delta.dataset_digest,
        trainer=fed.config.identity.principal,
        fisher=dict(delta.fisher),
        fisher_decay=delta.fisher_decay,
    )
    record = {"update": update.model_dump(mode="json"), "lineage": _record_run(fed, update, started_ms)}
    keep_state(fed, delta)
    write_durable(_run_path(fed, run_id, ".json"), canonical_json(record))
    failpoint("core.after_training")


def _publish(fed: Federation, run_id: str) -> DenseRef:
    done = json.loads(_run_path(fed, run_id, ".json").read_bytes())
    shutil.rmtree(_run_path(fed, run_id, ".checkpoints"), ignore_errors=True)  # from here on the run needs none
    update = DenseUpdate.model_validate(done["update"])
    if not _dense_path(fed, update.update_id).exists():
        partition, offset = fed.log.append(DENSE, key=run_id.encode(), value=update.to_bytes(), headers={})
        failpoint("core.after_publish")
        dense = DenseInput(**update.model_dump(), topic=DENSE, partition=partition, offset=offset)
        record = {"dense": dense.model_dump(mode="json"), "lineage": done["lineage"]}
        write_durable(_dense_path(fed, update.update_id), canonical_json(record))
    return DenseRef(update_id=update.update_id, run_id=run_id, base_version=update.base_version)


def _record_run(fed: Federation, update: DenseUpdate, started_ms: int) -> list[str]:
    from tier1.governance.lineage import Run, Source, run_event

    core = fed.config.core
    run = Run(
        kind="core_update",
        federation=fed.config.federation,
        run_id=update.update_id,
        principal=update.trainer,
        inputs=[Source(platform="file", name=name, digest=update.dataset_digest) for name in sorted(core.datasets)],
        outputs=[Source(platform="kafka", name=DENSE, digest=update.update_id)],
        parameters={
            "steps": core.steps,
            "batch_size": core.batch_size,
            "learning_rate": core.learning_rate,
            "seed": core.seed,
            **core.model_dump(include=OPTIMISER, exclude_defaults=True),
            **_rows_read(fed),
            **_protection(fed),
            **({"lora": canonical_json(core.lora.model_dump()).decode()} if core.lora else {}),
        },
        metrics={"tokens": float(update.tokens)},
        started_ms=started_ms,
        finished_ms=_now_ms(),
    )
    return list(fed.lineage.record(run_event(run)))


def _rows_read(fed: Federation) -> dict[str, str]:
    """Return how the packed rows are read, where it is not as they come."""
    core = fed.config.core
    masks = {"document_masks": "true"} if core.document_masks else {}
    return masks | ({"mixture": canonical_json(core.mixture).decode()} if core.mixture else {})


def _protection(fed: Federation) -> dict[str, str]:
    """Return the safeguards that are on, as they are configured, with the names of the old domains' datasets."""
    core = fed.config.core.safeguards
    on = {name: section for name, section in core if section and name != "rehearsal"}
    settings = {f"safeguards.{name}": canonical_json(section.model_dump()).decode() for name, section in on.items()}
    if core.rehearsal:
        settings["safeguards.rehearsal"] = ", ".join(sorted(core.rehearsal.datasets))
    return settings


def fold_dense(fed: Federation, ref: DenseRef) -> CandidateRef:
    """Fold a published dense delta into head, as its record in the log says it, with those of other clusters.

    Raises:
        PolicyDenied: the trainer may not aggregate from this topic.
        EnvelopeError: the update is altered, unsigned, or was trained on a version that this chain does not have.
        LogError: the log no longer holds the record.
        PayloadError: the delta does not fit the model, or the fold is not finite.
        SnapshotError: a blob of the delta or of head is missing or corrupt.
        ChainError: this home knows nothing of the run.
    """
    from tier1.versions.admission import admit_dense

    receipt = _receipt(fed, ref.update_id)
    grant = fed.authorise("aggregate", f"topic:{DENSE}", purpose="fold")
    state, place = fed.chain.state(), receipt["dense"]
    found = fed.log.read(DENSE, {place["partition"]: (place["offset"], place["offset"] + 1)})
    dense = admit_dense(next(iter(found)), state, fed.config.identity.trusted)
    if dense.update_id != ref.update_id:
        raise LogError(
            f"{DENSE}[{place['partition']}] offset {place['offset']} holds update {dense.update_id[:12]}, the run "
            f"published {ref.update_id[:12]}: the log re-used offsets; restore it or run core_update under a new name"
        )
    updates = gather_round(fed, dense)
    if not updates:
        return folded_elsewhere(fed, dense)
    candidate = fold_round(fed, updates, authorisation=grant.id, lineage=lambda update: _lineage(fed, update, receipt))
    digest = save_candidate(fed.home, candidate)
    log.info("core_update.folded", candidate=digest, head=candidate.parent_version, base=dense.base_version)
    return candidate_ref(digest, candidate)


def _lineage(fed: Federation, update: DenseInput, own: dict) -> list[str]:
    """Return the lineage of a run; another cluster's is known here where the clusters share a home."""
    if update.update_id == own["dense"]["update_id"]:
        return own["lineage"]
    return _receipt(fed, update.update_id)["lineage"] if _dense_path(fed, update.update_id).exists() else []


def _receipt(fed: Federation, update_id: str) -> dict:
    path = _dense_path(fed, update_id)
    try:
        receipt = json.loads(path.read_bytes())
        return {"dense": DenseInput.model_validate(receipt["dense"]).model_dump(), "lineage": list(receipt["lineage"])}
    except FileNotFoundError as error:
        raise ChainError(
            f"dense update {update_id[:12]} was not published from {fed.home}: run core_update here"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ChainError(
            f"receipt {path} of dense update {update_id[:12]} was altered: delete it and run core_update again under "
            "its name"
        ) from error


def _run_path(fed: Federation, run_id: str, suffix: str) -> Path:
    return fed.home / "dense" / f"run-{sha256_hex(run_id.encode())[:32]}{suffix}"


def _dense_path(fed: Federation, update_id: str) -> Path:
    return fed.home / "dense" / f"{update_id}.json"


def _now_ms() -> int:
    return int(time.time() * 1000)

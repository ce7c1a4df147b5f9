"""The fast loop's fold where experts are many: planned once, folded shard by shard, collected into one candidate.

    plan_fold → fold_shard for each shard → collect_fold

The candidate is that of `aggregate_experts`, to its digest, and nothing is lost with a shard: who collects folds what
is missing itself. A fold that is not a plain sum (an outer optimiser, a rule of dense blocks) has no shards and is made
where it is collected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from pydantic import ValidationError

from fednested_lib.blobs import write_durable
from fednested_lib.errors import ConfigError
from fednested_lib.signing import canonical_json, sha256_hex
from tier1.federation import Federation
from tier1.loops.aggregate_experts import admit_cut, fold_updates, keep_candidate, load_cut, probe
from tier1.loops.records import CandidateRef, CutRef, ShardFolded
from tier1.versions.manifest import Candidate

if TYPE_CHECKING:
    from tier1.aggregation.orthogonal import Protection
    from tier1.versions.shards import FoldPlan

log = structlog.get_logger()
MAX_SHARDS = 1024


def plan_fold(fed: Federation, cut: CutRef, shards: int) -> tuple[str, list[int]]:
    """Admit and weigh the updates of a cut; return the plan's digest and its shards, none if there is nothing to share.

    Raises:
        ConfigError: not a number of shards.
        PolicyDenied: the trainer may not aggregate from this topic.
        LogError: the log no longer holds what the cut names.
    """
    from tier1.versions.shards import FoldPlan, Recorder, slices_of

    if not 1 <= shards <= MAX_SHARDS:
        raise ConfigError(f"shards must be 1..{MAX_SHARDS}, got {shards}: as many as machines fold at once")
    if cut.n_records == 0:
        return "", []
    admission, fold = admit_cut(fed, load_cut(cut))
    recorder = Recorder()
    draft = fold(admission, fold=recorder)
    if recorder.weights is None:
        return "", []
    plan = FoldPlan(draft=draft, weights=recorder.weights, n_shards=shards)
    write_durable(_directory(fed, plan.digest()) / "plan.json", plan.to_bytes())
    return plan.digest(), [shard for shard in range(shards) if slices_of(plan, shard)]


def fold_shard(fed: Federation, digest: str, shard: int) -> ShardFolded:
    """Fold one shard of a plan and write down what it made; one that was folded before is not folded again.

    Raises:
        ConfigError: there is no such plan, or this machine computes otherwise than the plan's.
        SnapshotError: a blob is missing or corrupt.
        StorageError: a disk is full.
    """
    from tier1.versions import shards

    folded = _made(fed, digest, shard)
    if folded is None:
        plan = load_plan(fed, digest)
        folded = shards.fold_shard(
            plan, shard, blobs=fed.blobs, archive=fed.archive, protected=_protected(fed, plan.draft)
        )
        write_durable(_place(fed, digest, shard), canonical_json(folded))
        log.info("aggregate.shard_folded", plan=digest, shard=shard, slices=len(folded))
    return ShardFolded(shard=shard, n_slices=len(folded))


def collect_fold(fed: Federation, cut: CutRef, digest: str, done: Iterable[ShardFolded | None]) -> CandidateRef:
    """Make the candidate of all shards; fold those that are missing.

    Args:
        fed: the federation.
        cut: what was planned.
        digest: of the plan; empty folds the cut here.
        done: what the shards said; None is one that failed.

    Raises:
        PolicyDenied, LogError: as the fold in one task.
    """
    if not digest:
        return fold_updates(fed, cut)
    candidate = _merged(fed, digest)
    log.info("aggregate.collected", plan=digest, failed=sum(each is None for each in done))
    return keep_candidate(fed, _probed(fed, candidate))


def _merged(fed: Federation, digest: str) -> Candidate:
    from tier1.versions import shards

    plan = load_plan(fed, digest)
    shards.require_same_machine(plan)
    numbers = [shard for shard in range(plan.n_shards) if shards.slices_of(plan, shard)]
    for shard in numbers:
        fold_shard(fed, digest, shard)
    return shards.merge(plan, [_made(fed, digest, shard) for shard in numbers])


def _protected(fed: Federation, draft: Candidate) -> Protection | None:
    """Return what the fold keeps clear of; the chain is read only where there may be something."""
    from tier1.aggregation.orthogonal import protection

    settings = draft.settings.orthogonal
    return settings and protection(fed.chain.state().versions[draft.parent_version], settings, fed.blobs)


def _probed(fed: Federation, candidate: Candidate) -> Candidate:
    """Judge by the probe, if there is one; what it refuses is left out in a second fold, which is made here."""
    if candidate.settings.probe is None:
        return candidate
    from tier1.versions.admission import Admission
    from tier1.versions.archive import restore
    from tier1.versions.build import fold_candidate

    updates = tuple(restore(accepted, fed.archive) for accepted in candidate.accepted)
    admission = Admission(updates=updates, refused=tuple(candidate.refused))

    def fold(judged: Admission) -> Candidate:
        return fold_candidate(
            fed.chain.state().versions[candidate.parent_version],
            candidate.inputs,
            judged,
            rates=candidate.rates,
            settings=candidate.settings,
            blobs=fed.blobs,
            archive=fed.archive,
            trainer=candidate.trainer,
            authorisation=candidate.authorisation,
            lineage=candidate.lineage,
        )

    return probe(fed, candidate, admission, fold)


def load_plan(fed: Federation, digest: str) -> FoldPlan:
    """Read and verify a plan.

    Raises:
        ConfigError: there is none of this digest, or its bytes were altered.
    """
    from tier1.versions.shards import FoldPlan

    path = _directory(fed, digest) / "plan.json"
    try:
        data = path.read_bytes()
        if sha256_hex(data) == digest:
            return FoldPlan.model_validate_json(data)
    except (OSError, ValidationError):
        pass
    raise ConfigError(f"plan {digest[:12]} at {path} is missing or was altered: run aggregate_experts_sharded again")


def _made(fed: Federation, digest: str, shard: int) -> dict[str, str] | None:
    """Return what a shard made, if all of it is there."""
    try:
        folded = json.loads(_place(fed, digest, shard).read_bytes())
    except (OSError, ValueError):
        return None
    return folded if all(fed.blobs.has(blob) for blob in folded.values()) else None


def _place(fed: Federation, digest: str, shard: int) -> Path:
    return _directory(fed, digest) / f"{shard}.json"


def _directory(fed: Federation, digest: str) -> Path:
    return fed.home / "folds" / digest

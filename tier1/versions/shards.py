"""One fold on several machines: the experts of a candidate in S shards.

    plan      everything of the candidate but its blobs, and ω of every update and expert
    shard i   W_e ← W_e + η_T2 · Σ ω s B·A for the i-th, (i + S)-th, … slice that an update moves
    merge     the candidate, with the shards' digests for its blobs

A slice is one GEMM that no other slice has a part in, and the weights are computed once, so that the candidate is
bit-identical with that of one task; what a shard makes are blobs named by their content, so that to make them twice
changes nothing. Identical bytes are promised for one code and numeric profile: a machine of another kind folds no shard
of this plan. Every shard decodes every payload that it needs; that is linear where the products are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ConfigError
from fednested_lib.partition import expert_param
from fednested_lib.snapshot import expert_of, expert_shapes
from tier1.aggregation.fold import WeightedUpdate, fold_experts, numeric_profile
from tier1.aggregation.orthogonal import Protection
from tier1.aggregation.registry import origin
from tier1.aggregation.spool import FactorSpool
from tier1.versions.archive import read_delta, restore
from tier1.versions.build import code_version
from tier1.versions.candidates import snapshot_of
from tier1.versions.document import Document
from tier1.versions.manifest import Candidate, Digest

Weights = dict[str, dict[str, float]]  # update id → "layer.expert" → ω


class FoldPlan(Document):
    """A fold that is decided on and not made: `draft` still has its parent's blobs."""

    draft: Candidate
    weights: dict[Digest, dict[str, float]]
    n_shards: int


class Recorder:
    """Stands in for `fold_experts` while a candidate is drafted: keeps the weights and folds nothing."""

    def __init__(self) -> None:
        self.weights: Weights | None = None  # None: the fold did not come here

    def __call__(
        self, blobs: Mapping[str, str], updates: Sequence[WeightedUpdate], *, eta: float, store: BlobStore
    ) -> dict[str, str]:
        """Note ω of every update."""
        self.weights = {
            update.update_id: {f"{layer}.{expert}": float(omega) for (layer, expert), omega in update.weights.items()}
            for update in updates
        }
        return dict(blobs)


def slices_of(plan: FoldPlan, shard: int) -> list[str]:
    """Return the keys of a shard's slices; every slice that an update moves is in exactly one shard."""
    moved = {place for weights in plan.weights.values() for place, omega in weights.items() if omega != 0.0}
    touched = [key for key in sorted(plan.draft.blobs) if _place(key) in moved]
    return touched[shard :: plan.n_shards]


def fold_shard(
    plan: FoldPlan, shard: int, *, blobs: BlobStore, archive: BlobStore, protected: Protection | None = None
) -> dict[str, str]:
    """Fold the slices of one shard.

    Args:
        plan: of the whole fold.
        shard: 0 ≤ shard < plan.n_shards.
        blobs: holds the parent's blobs and receives the new ones.
        archive: payloads of the updates.
        protected: what a fold on the plan's parent keeps clear of.

    Returns:
        Slice key → digest.

    Raises:
        ConfigError: this machine computes otherwise than the plan's.
        ChainCorrupt: an archived envelope or payload was altered.
        SnapshotError: a blob is missing or corrupt.
        StorageError: a disk is full.
    """
    require_same_machine(plan)
    keys = slices_of(plan, shard)
    places, shapes = {_place(key) for key in keys}, expert_shapes(snapshot_of(plan.draft))
    with FactorSpool() as spool:
        terms = []
        for accepted in plan.draft.accepted:
            weights = {p: omega for p, omega in plan.weights[accepted.update_id].items() if p in places and omega}
            if weights:
                update = restore(accepted, archive)
                spool.add(accepted.update_id, read_delta(update, archive, shapes))
                terms.append(_weighted(update.envelope, weights, spool))
        mine = {key: plan.draft.blobs[key] for key in keys}
        terms = terms if protected is None else protected.projected(terms)
        return fold_experts(mine, terms, eta=plan.draft.rates.eta_t2, store=blobs)


def require_same_machine(plan: FoldPlan) -> None:
    """Let nobody mix slices of two numeric profiles or codes in one version.

    Raises:
        ConfigError: with both.
    """
    here = (code_version() + origin(plan.draft.settings.rule), numeric_profile())
    if here != (plan.draft.code_version, plan.draft.profile):
        raise ConfigError(
            f"this pod folds as {_told(*here)}, its plan as {_told(plan.draft.code_version, plan.draft.profile)}: give "
            "all pods of a sharded fold one image and one kind of machine (a node selector of the pod template)"
        )


def merge(plan: FoldPlan, shards: Sequence[Mapping[str, str]]) -> Candidate:
    """Return the candidate of all shards."""
    folded = dict(plan.draft.blobs)
    for shard in shards:
        folded.update(shard)
    return plan.draft.model_copy(update={"blobs": folded})


def _place(key: str) -> str | None:
    found = expert_of(key)
    return None if found is None else f"{expert_param(found[0])[0]}.{found[1]}"


def _weighted(envelope, weights: Mapping[str, float], spool: FactorSpool) -> WeightedUpdate:
    places = {tuple(map(int, place.split("."))): omega for place, omega in weights.items()}
    update_id = envelope.update_id
    return WeightedUpdate(
        update_id=update_id,
        client_id=envelope.client_id,
        scale=envelope.adapter.spec().scale,
        weights=places,
        factors=lambda param, expert: spool.read(update_id, param, expert),
    )


def _told(code: str, profile) -> str:
    return f"{code} on torch {profile.torch}, {profile.instruction_set}"

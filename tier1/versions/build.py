"""F: a version as a function of its parent, its inputs and the configuration.

    candidate = F(parent, inputs, rates, settings)

One function for every occasion: the first fold, the fold with halved η after a failed gate, the fold on a new head
after a lost race, the fold of inputs that a rejection set free, and replay. It reads the parent's blobs and archived
inputs, writes the new blobs, and returns the manifest of what it made. Nothing else has a say: not the clock, not the
order of arrival, not the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path

import fednested_lib
from fednested_lib.blobs import BlobStore
from fednested_lib.failpoints import failpoint
from fednested_lib.signing import canonical_json, sha256_hex
from fednested_lib.snapshot import expert_shapes
from tier1.aggregation.coordinate import statistic_of
from tier1.aggregation.dense import fold_dense_blobs
from tier1.aggregation.fisher import fold_fisher
from tier1.aggregation.fold import WeightedUpdate, fold_experts, magnitude, numeric_profile
from tier1.aggregation.orthogonal import protection
from tier1.aggregation.outer import fold_stepped
from tier1.aggregation.registry import choose, origin
from tier1.aggregation.reputation import trusts
from tier1.aggregation.spool import FactorSpool
from tier1.aggregation.streaming import dense_root, spooled_grams
from tier1.aggregation.weights import TIER1_ROOT, Expert, Weighing, device_clips, discount, weigh
from tier1.versions.admission import NOTHING_ADMITTED, Admission, readmit
from tier1.versions.archive import Update, envelope_digest, read_delta, restore
from tier1.versions.manifest import Accepted, Candidate, DenseInput, Inputs
from tier1.versions.settings import AggregationSettings, Rates
from tier1.versions.state import ChainState, VersionView

TIER1_STATE = "tier1/"  # slices of both tiers' optimisers stand in one table: core updates' under this prefix
FoldExperts = Callable[..., dict[str, str]]  # as `fold_experts`


@cache
def code_version() -> str:
    """Name the code of F: the release, and a digest over the sources it consists of."""
    here = Path(__file__).parent
    rooms = (here, here.parent / "aggregation", Path(fednested_lib.__file__).parent)
    sources = {f"{path.parent.name}/{path.name}": path.read_bytes() for room in rooms for path in room.glob("*.py")}
    digest = sha256_hex(canonical_json({name: sha256_hex(data) for name, data in sources.items()}))
    return f"{fednested_lib.__version__}+{digest[:12]}"


def fold_candidate(
    parent: VersionView,
    inputs: Inputs,
    admission: Admission = NOTHING_ADMITTED,
    *,
    rates: Rates,
    settings: AggregationSettings,
    blobs: BlobStore,
    archive: BlobStore,
    trainer: str,
    authorisation: str,
    lineage: Sequence[str] = (),
    fold: FoldExperts | None = None,
) -> Candidate:
    """Fold inputs into `parent`.

    A cut: W_experts ← W_experts + η_T2 · ΔW_agg. A round of dense updates: W_core ← W_core + η_core · ΔW_core and
    W_experts ← W_experts + η_T1 · ΔW_experts; the parent may be newer than the versions they were trained on.

    Args:
        parent: the version to build on.
        inputs: a cut or a round of dense updates.
        admission: what `admit` made of the cut's records, in any order; payloads are archived.
        rates: step sizes.
        settings: clip, prior, rule and mass.
        blobs: holds the parent's blobs and receives the new ones.
        archive: payloads of device updates, slices of dense deltas.
        trainer: principal that folds; recorded.
        authorisation: id of the policy decision; recorded.
        lineage: ids of lineage records; recorded.
        fold: folds the experts of a cut where the plain sum does; another one than here plans it for several machines.

    Raises:
        PayloadError: a dense delta does not fit the model or is not finite.
        SnapshotError: a blob of the parent or the archive is missing or corrupt.
        StorageError: a disk is full.
    """
    if inputs.dense is not None:
        accepted: list[Accepted] = []
        folded, outer = _fold_round(parent, inputs.round, rates, settings, blobs, archive)
        fisher = fold_fisher(
            parent.fisher,
            [(update.fisher_decay, update.fisher) for update in inputs.round if update.fisher],
            weights=parent.blobs,
            store=blobs,
            archive=archive,
        )
    else:
        fisher = dict(parent.fisher)
        folded, outer, accepted = _fold_updates(
            parent, admission.updates, rates.eta_t2, settings, blobs, archive, fold or fold_experts
        )
    failpoint("fold.after_blobs")
    return Candidate(
        parent=parent.digest,
        parent_version=parent.version,
        inputs=inputs,
        accepted=accepted,
        refused=sorted(admission.refused, key=lambda record: (record.partition, record.offset)),
        rates=rates,
        settings=settings,
        code_version=code_version() + origin(settings.rule),
        profile=numeric_profile(),
        family=parent.family,
        model=parent.model,
        tokenizer=parent.tokenizer,
        blobs=folded,
        trainer=trainer,
        authorisation=authorisation,
        lineage=list(lineage),
        outer=outer,
        fisher=fisher,
    )


def refold(candidate: Candidate, state: ChainState, rates: Rates, *, blobs: BlobStore, archive: BlobStore) -> Candidate:
    """Fold the inputs of a candidate again, from the archive: on the head of `state`, with `rates`.

    Updates that the chain has accepted meanwhile, or that are too stale for this head, move to the refused.

    Raises:
        ChainCorrupt: an archived envelope or payload was altered.
        SnapshotError: a blob is missing or corrupt.
        StorageError: a disk is full.
    """
    admission = readmit([restore(accepted, archive) for accepted in candidate.accepted], state, candidate.settings)
    return fold_candidate(
        state.head,
        candidate.inputs,
        Admission(updates=admission.updates, refused=(*candidate.refused, *admission.refused)),
        rates=rates,
        settings=candidate.settings,
        blobs=blobs,
        archive=archive,
        trainer=candidate.trainer,
        authorisation=candidate.authorisation,
        lineage=candidate.lineage,
    )


def _fold_round(
    parent: VersionView,
    updates: Sequence[DenseInput],
    rates: Rates,
    settings: AggregationSettings,
    blobs: BlobStore,
    archive: BlobStore,
) -> tuple[dict[str, str], dict[str, str]]:
    """Fold the dense updates of one round; with an outer optimiser a late one counts less."""
    outer = settings.core_outer
    folded, states = fold_dense_blobs(
        parent.blobs,
        [(_lateness(parent, update, settings) / len(updates), update.blobs) for update in updates],
        eta_core=rates.eta_core,
        eta_t1=rates.eta_t1,
        store=blobs,
        archive=archive,
        outer=outer,
        states={k.removeprefix(TIER1_STATE): d for k, d in parent.outer.items() if k.startswith(TIER1_STATE)},
    )
    return folded, {**parent.outer, **{TIER1_STATE + key: digest for key, digest in states.items()}}


def _lateness(parent: VersionView, update: DenseInput, settings: AggregationSettings) -> float:
    """Return the discount for rounds of core updates since the base; without an outer optimiser there is none."""
    since = takewhile(lambda view: view.version > update.base_version, parent.lineage())
    missed = sum(view.dense is not None for view in since)
    return 1.0 if settings.core_outer is None else discount(missed, settings)


def _fold_updates(
    parent: VersionView,
    updates: Sequence[Update],
    eta: float,
    settings: AggregationSettings,
    blobs: BlobStore,
    archive: BlobStore,
    fold: FoldExperts,
) -> tuple[dict[str, str], dict[str, str], list[Accepted]]:
    """Clip, weigh and fold, one decoded update and then one expert matrix in memory at a time."""
    ordered = sorted(updates, key=lambda update: update.envelope.update_id)
    shapes = expert_shapes(parent.snapshot)
    tokens = [update.tokens() for update in ordered]
    stalenesses = [parent.staleness(update.envelope.base_version) for update in ordered]
    clients = [update.envelope.client_id for update in ordered]
    trust = None if settings.reputation is None else trusts(parent, clients, settings.reputation)
    with FactorSpool() as spool:
        norms = []
        for update, counts in zip(ordered, tokens, strict=True):
            delta = read_delta(update, archive, shapes)
            norms.append(magnitude(delta, counts)[0])
            spool.add(update.envelope.update_id, delta)
        clips = device_clips(clients, norms, tokens, settings)
        terms = [_weighted(update, {}, spool) for update in ordered]
        root = dense_root(_last_dense(parent), archive) if settings.root == TIER1_ROOT else None
        weighing = weigh(
            clients,
            tokens,
            stalenesses,
            clips,
            settings,
            norms=norms,
            trusts=None if trust is None else [trust[client] for client in clients],
            grams=spooled_grams(terms, clips, list(shapes), root),
        )
        terms = [_weighted(update, row, spool) for update, row in zip(ordered, weighing.weights, strict=True)]
        folded, outer = _fold(parent, terms, eta, settings, weighing, blobs, fold)
    rows = zip(ordered, stalenesses, norms, clips, weighing.weights, strict=True)
    accepted = [_accepted(*row) for row in rows]
    return (
        folded,
        outer,
        [
            row.model_copy(update={"trust": trust and trust[row.client_id], "cosine": cosine, "distance": distance})
            for row, cosine, distance in zip(accepted, weighing.cosines, weighing.distances, strict=True)
        ],
    )


def _fold(
    parent: VersionView,
    updates: Sequence[WeightedUpdate],
    eta: float,
    settings: AggregationSettings,
    weighing: Weighing,
    blobs: BlobStore,
    fold: FoldExperts,
) -> tuple[dict[str, str], dict[str, str]]:
    """Fold weighted updates; the plain sum takes the short way."""
    protected = protection(parent, settings.orthogonal, blobs)
    updates = updates if protected is None else protected.projected(updates)
    if settings.outer is None and not weighing.by_block:
        return fold(parent.blobs, updates, eta=eta, store=blobs), dict(parent.outer)
    chosen = choose(settings)
    return fold_stepped(
        parent.blobs,
        updates,
        eta=eta,
        store=blobs,
        outer=settings.outer,
        states=parent.outer,
        by_block=weighing.by_block,
        statistic=statistic_of(chosen.name, chosen.options),
    )


def _last_dense(parent: VersionView) -> Mapping[str, str]:
    """Return slice key → digest of the newest tier-1 delta on the way to `parent`; empty if there is none."""
    return next((view.dense.blobs for view in parent.lineage() if view.dense is not None), {})


def _weighted(update: Update, weights: dict[Expert, float], spool: FactorSpool) -> WeightedUpdate:
    update_id = update.envelope.update_id
    return WeightedUpdate(
        update_id=update_id,
        client_id=update.envelope.client_id,
        scale=update.envelope.adapter.spec().scale,
        weights=weights,
        factors=lambda param, expert: spool.read(update_id, param, expert),
    )


def _accepted(update: Update, staleness: int, norm: float, clip: float, weights: dict[Expert, float]) -> Accepted:
    envelope = update.envelope
    return Accepted(
        update_id=envelope.update_id,
        client_id=envelope.client_id,
        key_epoch=envelope.key_epoch,
        sequence=envelope.sequence,
        base_version=envelope.base_version,
        staleness=staleness,
        partition=update.partition,
        offset=update.offset,
        record_sha256=update.record_sha256,
        envelope_sha256=envelope_digest(update),
        payload_sha256=envelope.payload_sha256,
        payload_bytes=envelope.payload_bytes,
        public_key=update.public_key,
        tokens=sum(update.tokens().values()),
        norm=norm,
        clip=clip,
        weight=math.fsum(weights.values()) / len(weights) if weights else 0.0,
        experts=len(weights),
    )

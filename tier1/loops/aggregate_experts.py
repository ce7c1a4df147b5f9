"""The fast loop, step by step: take a cut of the update log, verify, probe, weigh, fold.

    W_experts ← W_experts + η_T2·ΔW_agg

ΔW_agg is the weighed sum of the deltas that were accepted; refused ones are recorded with their reasons.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from fednested_lib.blobs import write_durable
from fednested_lib.errors import ConfigError
from fednested_lib.log import UPDATES
from tier1.federation import Federation
from tier1.loops.genesis import ensure_genesis
from tier1.loops.records import CandidateRef, CutRef, TakenCut, Window
from tier1.versions.candidates import save_candidate, snapshot_of
from tier1.versions.manifest import Candidate, Cut, Inputs

if TYPE_CHECKING:
    from tier1.versions.admission import Admission

log = structlog.get_logger()


def take_updates(fed: Federation) -> CutRef:
    """Wait for K updates or T seconds and cut the log where head's cut ended.

    Raises:
        LogError: the log lost records or re-used offsets.
        TransportError: the broker does not answer.
    """
    from tier1.versions.cut import take_cut

    window = fed.config.window
    cut = take_cut(
        fed.log,
        ensure_genesis(fed),
        min_updates=window.min_updates,
        max_wait_s=window.max_wait_s,
        max_updates=window.max_updates,
    )
    return _store_cut(fed, cut)


def open_window(fed: Federation, *, now: float) -> Window:
    """Say what a sensor shall wait for, from where head's cut ended; `now` is in seconds since the epoch."""
    state, settings = ensure_genesis(fed), fed.config.window
    topic, log_id = state.log or (UPDATES, "")
    return Window(
        bootstrap=fed.config.log.servers(),
        topic=topic,
        log_id=log_id,
        generation=state.generation,
        offsets=dict(state.offsets),
        last_offsets={partition: offset for partition, (offset, _) in state.last_records.items()},
        last_digests={partition: digest for partition, (_, digest) in state.last_records.items()},
        opened_at=now,
        min_updates=settings.min_updates,
        max_wait_s=settings.max_wait_s,
        max_bytes=settings.max_bytes,
        max_updates=settings.max_updates,
    )


def keep_cut(fed: Federation, taken: TakenCut) -> CutRef:
    """Store the cut that a sensor returned; the fold reads it again and compares digests.

    A cut that does not go on where the chain ends now is no error: another loop folded these updates meanwhile. It
    comes back empty, and what it held and nobody consumed is in the next window.
    """
    from tier1.versions.state import continues

    cut = Cut(
        topic=taken.topic,
        log_id=taken.log_id,
        ranges={partition: tuple(bounds) for partition, bounds in taken.ranges.items()},
        records_digest=taken.records_digest,
        n_records=taken.n_records,
        generation=taken.generation,
    )
    state = fed.chain.state()
    if not continues(state, cut):
        log.info("aggregate.cut_superseded", ranges=cut.ranges, consumed=dict(state.offsets))
        return CutRef(path="", n_records=0, topic=cut.topic)
    return _store_cut(fed, cut)


def _store_cut(fed: Federation, cut: Cut) -> CutRef:
    path = fed.home / "cuts" / f"{cut.digest()}.json"
    write_durable(path, cut.to_bytes())
    log.info("aggregate.cut", records=cut.n_records, ranges=cut.ranges)
    return CutRef(path=str(path), n_records=cut.n_records, topic=cut.topic)


def fold_updates(fed: Federation, cut: CutRef) -> CandidateRef:
    """Verify, weigh and fold the updates of a cut into head; refused ones are recorded with their reasons.

    Raises:
        PolicyDenied: the trainer may not aggregate from this topic.
        LogError: the log no longer holds what the cut names.
    """
    if cut.n_records == 0:
        return CandidateRef(digest="", parent_version=fed.chain.state().head.version, n_accepted=0, n_refused=0)
    return keep_candidate(fed, fold_cut(fed, load_cut(cut)))


def keep_candidate(fed: Federation, candidate: Candidate) -> CandidateRef:
    """Store a folded candidate and say what it holds."""
    digest = save_candidate(fed.home, candidate)
    n_accepted, n_refused = len(candidate.accepted), len(candidate.refused)
    head = candidate.parent_version
    log.info("aggregate.folded", candidate=digest, head=head, accepted=n_accepted, refused=n_refused)
    return CandidateRef(digest=digest, parent_version=head, n_accepted=n_accepted, n_refused=n_refused)


def fold_cut(fed: Federation, cut: Cut) -> Candidate:
    """Authorise, admit, record lineage, and fold a cut on the current head."""
    admission, fold = admit_cut(fed, cut)
    return probe(fed, fold(admission), admission, fold)


def admit_cut(fed: Federation, cut: Cut) -> tuple[Admission, Callable[..., Candidate]]:
    """Authorise, admit and record lineage; return what was admitted, and what folds an admission on the head of now."""
    from tier1.versions.admission import admit
    from tier1.versions.build import fold_candidate
    from tier1.versions.cut import read_cut

    grant = fed.authorise("aggregate", f"topic:{cut.topic}", purpose="fold")
    state, settings = fed.chain.state(), fed.config.aggregation
    admission = admit(
        read_cut(fed.log, cut),
        state,
        devices=fed.config.devices,
        settings=settings,
        payloads=fed.payloads,
        archive=fed.archive,
    )
    fold = partial(
        fold_candidate,
        state.head,
        Inputs(cut=cut),
        rates=fed.config.rates,
        settings=settings,
        blobs=fed.blobs,
        archive=fed.archive,
        trainer=fed.config.identity.principal,
        authorisation=grant.id,
        lineage=record_fold(fed, cut, grant.id),
    )
    return admission, fold


def probe(
    fed: Federation, candidate: Candidate, admission: Admission, fold: Callable[[Admission], Candidate]
) -> Candidate:
    """Fold again without the updates that raise the loss of the suites, where the fold of all of them leads."""
    if candidate.settings.probe is None or not candidate.accepted:
        return candidate
    judged = _probed(fed, candidate, admission)
    return candidate if len(judged.updates) == len(admission.updates) else fold(judged)


def _probed(fed: Federation, candidate: Candidate, admission: Admission) -> Admission:
    from tier1.evaluation.probe import probed
    from tier1.loops.gate_candidate import registered_suites

    limits = fed.config.evaluation
    return probed(
        admission,
        snapshot_of(candidate),
        {suite.name: suite.path for suite in registered_suites(fed).values()},
        margin=candidate.settings.probe,
        blobs=fed.blobs,
        archive=fed.archive,
        seq_len=limits.seq_len,
        max_tokens=limits.max_tokens,
    )


def record_fold(fed: Federation, cut: Cut, decision_id: str) -> list[str]:
    """Write the lineage of one aggregation run to the outbox, once per cut."""
    from tier1.governance.lineage import Run, Source, run_event

    at_ms = int(time.time() * 1000)
    run = Run(
        kind="aggregate_experts",
        federation=fed.config.federation,
        run_id=Inputs(cut=cut).id(),
        principal=fed.config.identity.principal,
        inputs=[
            Source(
                platform="kafka",
                name=cut.topic,
                digest=cut.records_digest,
                detail={
                    "log": cut.log_id,
                    **{f"partition {p}": f"[{start}, {end})" for p, (start, end) in cut.ranges.items()},
                },
            )
        ],
        access_decisions=[decision_id],
        metrics={"records": float(cut.n_records)},
        started_ms=at_ms,
        finished_ms=at_ms,
    )
    return list(fed.lineage.record(run_event(run)))


def load_cut(ref: CutRef) -> Cut:
    """Read a stored cut.

    Raises:
        ConfigError: there is none at its path.
    """
    try:
        return Cut.model_validate_json(Path(ref.path).read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"cut {ref.path} does not exist: take a new one with aggregate_experts") from error

"""A round of core updates: what several tier-1 clusters have published on `updates.tier1`, folded together.

A cluster is whoever signs with a key of its own. Its core update ends as it does alone: the delta is on the log,
signed. Then it waits until every cluster has published one that the chain has not consumed, or for
`core.clusters.max_wait_s`, and folds all there are; so nobody waits for a cluster that is dead, and what comes late is
part of the next round, where `aggregation.core_outer` discounts it. Whoever folds first advances head; the others find
their delta folded.

Between rounds a cluster keeps its optimiser state and its place in the schedule, if `core.schedule_steps` says so
(DiLoCo's inner optimiser). That is a matter of the cluster alone: it is in no version and is not replayed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from fednested_lib.blobs import write_durable
from fednested_lib.errors import EnvelopeError, PayloadError, SnapshotError, TrainingError
from fednested_lib.log import DENSE
from fednested_lib.signing import canonical_json
from fednested_lib.snapshot import read_slice
from tier1.federation import Federation
from tier1.loops.records import CandidateRef
from tier1.versions.candidates import save_candidate
from tier1.versions.manifest import Candidate, DenseInput, Inputs
from tier1.versions.state import ChainState

if TYPE_CHECKING:
    from tier1.training.checkpoint import Checkpoints, Found
    from tier1.training.core_update import DenseDelta

log = structlog.get_logger()

POLL_S = 2.0


def gather_round(
    fed: Federation,
    own: DenseInput,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[DenseInput]:
    """Return the dense updates to fold with `own`, itself included; empty if another cluster folded it meanwhile.

    Another cluster's that cannot be folded is waited for and left out as if it had not come. It stays on the log: it is
    part of a later round, if its blobs come back.

    Args:
        fed: the federation of one cluster.
        own: what it has published.
        clock: seconds, of any origin.
        sleep: waits so many seconds.

    Raises:
        TransportError: the log does not answer.
        SnapshotError: a blob of head is missing or corrupt.
    """
    settings = fed.config.core.clusters
    if settings.count == 1:
        return [own]
    deadline, others = clock() + settings.max_wait_s, _Others(fed)
    while True:
        state = fed.chain.state()
        if _alone(own) in state.spent:
            return []
        waiting = [dense for dense in waiting_updates(fed, state) if dense.update_id != own.update_id]
        found = {dense.update_id: dense for dense in (own, *filter(others.usable, waiting))}
        present = {dense.signer for dense in found.values()}
        if len(present) >= settings.count or clock() >= deadline:
            log.info("core_round.gathered", clusters=len(present), of=settings.count, updates=len(found))
            return list(found.values())
        sleep(POLL_S)


def waiting_updates(fed: Federation, state: ChainState) -> list[DenseInput]:
    """Return the valid updates on the log that no entry has consumed and none is about to fold again, in log order.

    Raises:
        TransportError: the log does not answer.
    """
    from tier1.versions.admission import admit_dense

    taken = {*state.spent, *(sealed.entry.body.candidate.inputs.id() for sealed in state.pending)}
    found = []
    for record in fed.log.read(DENSE, fed.log.watermarks(DENSE)):
        try:
            dense = admit_dense(record, state, fed.config.identity.trusted)
        except EnvelopeError as error:  # one bad record must not stop the clusters
            log.info("core_round.refused", partition=record.partition, offset=record.offset, reason=error.reason)
            continue
        if _alone(dense) not in taken:
            found.append(dense)
    return found


def fold_round(
    fed: Federation,
    updates: Sequence[DenseInput],
    *,
    authorisation: str,
    lineage: Callable[[DenseInput], list[str]],
) -> Candidate:
    """Fold the updates of a round into head.

    Args:
        fed: the federation of one cluster.
        updates: what `gather_round` returned.
        authorisation: id of the grant to aggregate.
        lineage: returns the lineage records of one update.

    Raises:
        PayloadError: the cluster's own update does not fit the model or is not finite, or the fold is not.
        SnapshotError: a blob of it or of head is missing or corrupt.
    """
    from tier1.versions.build import fold_candidate

    return fold_candidate(
        fed.chain.state().head,
        Inputs.of_round(updates),
        rates=fed.config.rates,
        settings=fed.config.aggregation,
        blobs=fed.blobs,
        archive=fed.archive,
        trainer=fed.config.identity.principal,
        authorisation=authorisation,
        lineage=[record for update in updates for record in lineage(update)],
    )


class _Others:
    """What is known of other clusters' updates while one waits: each is read once."""

    def __init__(self, fed: Federation):
        self._fed, self._parent = fed, fed.chain.state().head
        self._shapes: dict[str, Mapping[str, tuple[int, ...]]] = {}
        self._known: dict[str, bool] = {}

    def usable(self, update: DenseInput) -> bool:
        """Say whether an update can be folded; the first time, say why it cannot."""
        if update.update_id not in self._known:
            self._known[update.update_id] = self._judged(update)
        return self._known[update.update_id]

    def _judged(self, update: DenseInput) -> bool:
        from tier1.aggregation.dense import require_delta
        from tier1.aggregation.fisher import require_fisher

        shapes = self._shapes_of(self._parent.blobs if update.fisher else update.blobs)
        try:
            require_delta(update.blobs, shapes, self._fed.archive)
            if update.fisher:
                require_fisher(update.fisher, shapes, self._fed.archive)
        except (PayloadError, SnapshotError) as error:
            log.warning("core_round.unusable", run=update.run_id, update_id=update.update_id, reason=str(error))
            return False
        return True

    def _shapes_of(self, keys: Iterable[str]) -> dict[str, Mapping[str, tuple[int, ...]]]:
        """Return those of the slices that the model has; every version of a chain has the same."""
        from tier1.aggregation.dense import shapes_of

        for key in {*keys} & set(self._parent.blobs) - set(self._shapes):
            self._shapes[key] = shapes_of(read_slice(key, self._parent.blobs[key], self._fed.blobs))
        return self._shapes


def folded_elsewhere(fed: Federation, own: DenseInput) -> CandidateRef:
    """Return the candidate with which another cluster folded `own`."""
    state = fed.chain.state()
    candidate: Candidate = fed.chain.entries()[state.spent[_alone(own)]].entry.body.candidate
    digest = save_candidate(fed.home, candidate)
    return candidate_ref(digest, candidate)


def candidate_ref(digest: str, candidate: Candidate) -> CandidateRef:
    """Return what the next loop is told of a folded round."""
    n_accepted = len(candidate.inputs.round)
    return CandidateRef(digest=digest, parent_version=candidate.parent_version, n_accepted=n_accepted, n_refused=0)


def _alone(dense: DenseInput) -> str:
    return Inputs(dense=dense).id()


def last_state(fed: Federation, step: int | None = None) -> Found | None:
    """Return where this cluster's schedule stands and its optimiser state; None: at the beginning.

    Args:
        fed: the federation of one cluster.
        step: where it stood then; None: now. The state before the last is kept too.

    Raises:
        TrainingError: the state under this key is of another federation, or that of ``step`` is not kept any more.
    """
    if fed.config.core.schedule_steps is None or step == 0:
        return None
    found = _kept(fed).newest(step)
    if found is None and step is not None:
        raise TrainingError(
            f"the run began at step {step} of the schedule, whose state is not in {_kept(fed).directory} any more: "
            "other runs of this cluster have gone on; train under another run name"
        )
    return found


def begin_schedule(fed: Federation, begun: Path) -> Found | None:
    """Return what a run goes on from, which its retries keep: what is newest then may be its own.

    Args:
        fed: the federation of one cluster.
        begun: file of the run, JSON, in which the step of the schedule is written down.

    Raises:
        TrainingError: see `last_state`.
        StorageError: the disk is full.
    """
    record = json.loads(begun.read_bytes())
    found = last_state(fed, record.get("first_step"))
    if fed.config.core.schedule_steps is not None:
        write_durable(begun, canonical_json(record | {"first_step": found.progress.step if found else 0}))
    return found


def keep_state(fed: Federation, delta: DenseDelta) -> None:
    """Keep what the cluster's next run goes on from, if its schedule spans several.

    Raises:
        StorageError: the disk is full; the next run goes on from the state before.
    """
    from tier1.training.checkpoint import Progress

    if delta.state is None:
        return
    report = delta.report
    progress = Progress(step=delta.last_step, loss_first=report.loss_first, loss_last=report.loss_last)
    _kept(fed).save(progress, delta.state)


def _kept(fed: Federation) -> Checkpoints:
    from tier1.training.checkpoint import Checkpoints

    directory = fed.home / "dense" / f"cluster-{fed.signer.public_key[:32]}"
    return Checkpoints(directory=directory, every=1, run={"genesis": fed.chain.entries()[0].digest})

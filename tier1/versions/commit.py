"""Settle a candidate: gate it, commit it, or reject it for good; every try is recorded.

    gate passes         → head advances, if nobody else was first (compare-and-swap)
    somebody was first  → fold the same inputs on the new head and gate again: deltas are additive, so this is cheap
    gate fails          → halve η and fold again, at most `max_tries` times; then the rejection is an entry of its own
    nothing to fold     → a cut without one acceptable update is spent as a rejection and takes no version number

A second run of the same inputs finds the entry that consumed them and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

import structlog

from fednested_lib.errors import ChainConflict, ChainError
from tier1.versions.chain import Chain
from tier1.versions.manifest import Candidate, GateRecord, Rejection, Try, Version
from tier1.versions.settings import Rates
from tier1.versions.state import ChainState, Sealed, continues, offsets_after

log = structlog.get_logger()

Gate = Callable[[Candidate], GateRecord]
Fold = Callable[[ChainState, Rates], Candidate]  # the same inputs, on the head of a state
Outcome = Literal["advanced", "rejected", "already", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Settlement:
    """What became of a candidate.

    Args:
        outcome: `advanced` (head is a new version), `rejected`, `already` (these inputs were consumed before) or
            `nothing` (the cut is empty: no entry).
        sealed: the entry that consumed the inputs; None for `nothing`.
        candidate: the one that was settled, maybe another than was handed in.
    """

    outcome: Outcome
    sealed: Sealed | None
    candidate: Candidate


def utc_now() -> str:
    """Return the time of an entry, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def settle(
    candidate: Candidate,
    *,
    chain: Chain,
    gate: Gate,
    fold: Fold,
    save: Callable[[Candidate], str],
    max_tries: int,
    now: Callable[[], str] = utc_now,
) -> Settlement:
    """Bring a candidate to its entry in the chain.

    Args:
        candidate: as folded.
        chain: opened with a key.
        gate: the automatic gate; its record must name the candidate it was given.
        fold: folds the same inputs again (`build.refold` of the first candidate).
        save: stores every candidate durably before it is gated (`candidates.save_candidate` of a home).
        max_tries: how many candidates may fail the gate before the inputs are rejected, ≥ 1.
        now: time of the entry.

    Raises:
        ChainConflict: the inputs overlap what another committer consumed; take a new cut.
        ChainCorrupt: the chain is damaged.
        StorageError: a disk is full.
    """
    tries: list[Try] = []
    gated: dict[str, GateRecord] = {}
    while True:
        state = chain.state()
        settled = _settled(candidate, chain, state)
        if settled is not None:
            return settled
        digest = candidate.digest()
        if candidate.parent != state.head.digest:
            tries.append(_try(candidate, digest, "lost_race", gated.get(digest)))
            log.info("candidate.lost_race", candidate=digest, head=state.head.version)
            candidate = fold(state, candidate.rates)
            continue
        if candidate.inputs.cut is not None and not candidate.accepted:
            body = _rejection(candidate, state, tries, f"no update accepted: {len(candidate.refused)} refused", now())
        else:
            save(candidate)
            if digest not in gated:
                gated[digest] = _gated(gate, candidate, digest)
            body = _judged(candidate, state, tries, gated[digest], max_tries, now())
        if body is None:
            tries.append(_try(candidate, digest, "gate_failed", gated[digest]))
            log.info("candidate.gate_failed", candidate=digest, n_tries=len(tries), reason=gated[digest].reason)
            candidate = fold(state, candidate.rates.halved())
            continue
        try:
            sealed = chain.append(body, state.next_seq)
        except ChainConflict:
            continue  # the next state tells what the other committer did
        return Settlement(
            outcome="advanced" if body.kind == "version" else "rejected", sealed=sealed, candidate=candidate
        )


def _judged(
    candidate: Candidate, state: ChainState, tries: list[Try], record: GateRecord, max_tries: int, created_at: str
) -> Version | Rejection | None:
    """Return the entry that a gate result leads to, None for another try."""
    if record.passed:
        return Version(
            version=max(state.versions) + 1,
            candidate=candidate,
            tries=[*tries, _try(candidate, record.candidate, "passed", record)],
            offsets=_offsets(state, candidate),
            created_at=created_at,
        )
    n_failed = 1 + sum(one.outcome == "gate_failed" for one in tries)
    if n_failed < max_tries:
        return None
    tries = [*tries, _try(candidate, record.candidate, "gate_failed", record)]
    return _rejection(candidate, state, tries, f"automatic gate failed {n_failed} times: {record.reason}", created_at)


def _rejection(candidate: Candidate, state: ChainState, tries: list[Try], reason: str, created_at: str) -> Rejection:
    return Rejection(
        candidate=candidate, tries=tries, reason=reason, offsets=_offsets(state, candidate), created_at=created_at
    )


def _try(candidate: Candidate, digest: str, outcome: str, gate: GateRecord | None) -> Try:
    return Try(rates=candidate.rates, parent=candidate.parent, candidate=digest, outcome=outcome, gate=gate)


def _gated(gate: Gate, candidate: Candidate, digest: str) -> GateRecord:
    record = gate(candidate)
    if record.candidate != digest:
        raise ChainError(
            f"gate result is about candidate {record.candidate[:12]}, not {digest[:12]}: evaluate this one"
        )
    return record


def _offsets(state: ChainState, candidate: Candidate) -> dict[str, int]:
    """Return the chain's offsets after this candidate; inputs that are folded again were consumed before."""
    cut = candidate.inputs.cut
    if cut is None or _is_pending(candidate, state):
        return dict(state.offsets)
    return offsets_after(state.offsets, cut)


def _is_pending(candidate: Candidate, state: ChainState) -> bool:
    return any(sealed.entry.body.candidate.inputs == candidate.inputs for sealed in state.pending)


def _settled(candidate: Candidate, chain: Chain, state: ChainState) -> Settlement | None:
    """Return what there is nothing more to do about, or raise for a cut that overlaps another's."""
    seq = state.spent.get(candidate.inputs.id())
    if seq is not None:
        return Settlement(outcome="already", sealed=chain.entries()[seq], candidate=candidate)
    cut = candidate.inputs.cut
    if _is_pending(candidate, state):
        return None
    if cut is None:
        waiting = {sealed.entry.body.candidate.inputs.id() for sealed in state.pending}
        if any(part in state.spent or part in waiting for part in candidate.inputs.parts()):
            raise ChainConflict("a part of this round of core updates was folded by another committer: fold again")
        return None
    if not continues(state, cut):
        starts = {partition: start for partition, (start, _) in cut.ranges.items()}
        raise ChainConflict(
            f"cut of {cut.topic} starts at {starts} of log generation {cut.generation}, but the chain has consumed up "
            f"to {dict(state.offsets)} of generation {state.generation}: another committer was first; take a new cut"
        )
    if cut.n_records == 0:
        return Settlement(outcome="nothing", sealed=None, candidate=candidate)
    return None

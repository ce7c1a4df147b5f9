"""The outer loop, step by step: evaluate, gate, advance head; then a person's decision makes it champion.

    head ← candidate     if no suite's loss rises by more than the bound; else halve η and fold again, then reject
    champion ← head      if an approver who is not the trainer approves; a rejection voids it and its successors,
                         whose inputs are folded again without it

The chain entry is the decision; registry, quarantine topic and lineage are views that are repaired from it, so a crash
after the entry costs nothing but a second call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import structlog

from fednested_lib.errors import ChainConflict, GovernanceError, PromotionBlocked
from fednested_lib.failpoints import failpoint
from tier1.federation import Federation
from tier1.governance.approvals import DecisionInput, parse_decision
from tier1.governance.ports import AccessDecision, AccessRequest
from tier1.loops.anchors import require_whole_chain
from tier1.loops.gate_candidate import gate_candidate
from tier1.loops.genesis import now_text
from tier1.loops.records import CandidateRef, Outcome, Settled
from tier1.loops.views import sync_views
from tier1.versions.candidates import load_candidate, newest_first, save_candidate
from tier1.versions.manifest import Candidate, Decision, GateRecord, Version
from tier1.versions.settings import Rates
from tier1.versions.state import ChainState, Sealed, continues

log = structlog.get_logger()
NOTHING = Settled(
    status="nothing",
    version=-1,
    manifest="",
    candidate="",
    tries=0,
    reason="no candidate waits: nothing was folded since the last one",
)


def newest_candidate(fed: Federation) -> CandidateRef:
    """Return the newest candidate that can still be settled; its digest is empty if there is none.

    One whose inputs an entry has consumed, wholly or in part, is over: a round that died between fold and settle leaves
    such a candidate when the next round took a larger cut.
    """
    if fed.chain.exists():
        state = fed.chain.state()
        pending = {sealed.entry.body.candidate.inputs.id() for sealed in state.pending}
        for digest in newest_first(fed.home):
            candidate = load_candidate(fed.home, digest)
            name, cut = candidate.inputs.id(), candidate.inputs.cut
            if name in pending or (name not in state.spent and (cut is None or continues(state, cut))):
                return _reference(digest, candidate)
    return CandidateRef(digest="", parent_version=-1, n_accepted=0, n_refused=0)


def settle_candidate(fed: Federation, candidate: CandidateRef) -> Settled:
    """Bring a candidate (the newest unsettled one if its digest is empty) through the automatic gate into the chain.

    Running it again finds the entry of these inputs and changes nothing.

    Raises:
        ChainConflict: another committer consumed part of the same cut; take a new one.
        ChainCorrupt: the chain is damaged.
    """
    if fed.chain.exists():
        require_whole_chain(fed)
        refold_pending(fed)  # what an interrupted rejection left to do
        sync_views(fed)  # and what a crash after an entry did not show yet
    ref = candidate if candidate.digest else newest_candidate(fed)
    if not ref.digest:
        waiting = waiting_versions(fed)
        if not waiting:
            return NOTHING
        newest = fed.chain.state().versions[waiting[-1][0]]
        return _settled(fed, fed.chain.entries()[newest.seq])
    settlement = _settle(fed, load_candidate(fed.home, ref.digest))
    if settlement is None:
        return NOTHING
    sync_views(fed)
    return _settled(fed, settlement)


def _settle(fed: Federation, candidate: Candidate) -> Sealed | None:
    from tier1.versions.build import refold
    from tier1.versions.commit import settle

    fold: Callable[[ChainState, Rates], Candidate] = partial(refold, candidate, blobs=fed.blobs, archive=fed.archive)
    settlement = settle(
        candidate,
        chain=fed.chain,
        gate=partial(gate_candidate, fed),
        fold=fold,
        save=partial(save_candidate, fed.home),
        max_tries=fed.config.evaluation.max_tries,
    )
    sealed = settlement.sealed
    log.info("candidate.settled", outcome=settlement.outcome, seq=sealed.entry.seq if sealed else None)
    return sealed


def _settled(fed: Federation, sealed: Sealed) -> Settled:
    body = sealed.entry.body
    is_version = isinstance(body, Version)
    last = body.tries[-1] if body.tries else None
    return Settled(
        status="head" if is_version else "rejected",
        version=body.version if is_version else -1,
        manifest=sealed.digest,
        candidate=body.candidate.digest(),
        tries=len(body.tries),
        reason=(last.gate.reason if last and last.gate else "") if is_version else body.reason,
    )


def waiting_versions(fed: Federation) -> list[tuple[int, str]]:
    """Return (number, manifest digest) of the versions that are newer than the champion and wait for a decision."""
    if not fed.chain.exists():
        return []
    state = fed.chain.state()
    open_numbers = sorted(set(state.versions) - state.voided - state.approved - {0})
    champion = state.champion.version
    return [(number, state.versions[number].digest) for number in open_numbers if number > champion]


def manifest_of(fed: Federation, version: int) -> str:
    """Return the manifest digest of a version.

    Raises:
        GovernanceError: the chain has no such version.
    """
    versions = fed.chain.state().versions
    if version not in versions:
        raise GovernanceError(f"version must be one of 0..{max(versions)}, got {version}: see `fednested tier1 status`")
    return versions[version].digest


def decide(fed: Federation, settled: Settled, answer: str, channel: str) -> Outcome:
    """Record what the person decided about a settled version.

    Args:
        fed: the federation.
        settled: what `settle_candidate` returned.
        answer: a decision token, or `approve`, `reject`, `reject: reason`.
        channel: how a bare answer came: `console`, or `flag` (local profile only).

    Returns:
        The outcome; `blocked` when an approval lacks a requirement (named in `reason`; the champion is unchanged).

    Raises:
        GovernanceError: the answer is no decision, a token for another version, or by an unknown key.
    """
    if settled.status != "head":
        verdict = "gate_rejected" if settled.status == "rejected" else "nothing"
        return _outcome(fed, verdict, settled.version, settled.reason)
    if channel == "flag" and fed.config.profile != "local":
        raise GovernanceError("channel flag is for profile: local: answer the gate with a decision token")
    decision = parse_decision(
        answer,
        fed.config.governance.approvers,
        manifest_digest=settled.manifest,
        channel="flag" if channel == "flag" else "console",
    )
    require_whole_chain(fed)
    done = _decided_already(fed, settled, decision)
    if done is not None:
        return done
    if decision.verdict == "reject":
        return _reject(fed, settled, decision)
    try:
        return _approve(fed, settled, decision)
    except PromotionBlocked as blocked:
        log.warning("promotion.blocked", version=settled.version, approver=decision.approver)
        return _outcome(fed, "blocked", settled.version, str(blocked))


def _decided_already(fed: Federation, settled: Settled, decision: DecisionInput) -> Outcome | None:
    state = fed.chain.state()
    if settled.version in state.rejected:
        sync_views(fed)
        refold_pending(fed)
        return _outcome(fed, "rejected", settled.version, "rejected before")
    if settled.version in state.voided:
        return _outcome(fed, "rejected", settled.version, "voided: a version it was built on was rejected")
    if settled.version in state.approved and decision.verdict == "approve":
        sync_views(fed)
        return _outcome(fed, "approved", settled.version, "approved before")
    return None


def _outcome(fed: Federation, verdict: str, version: int, reason: str) -> Outcome:
    champion = fed.chain.state().champion.version if fed.chain.exists() else -1
    return Outcome(verdict=verdict, version=version, champion=champion, reason=reason)


def _ask_policy(fed: Federation, decision: DecisionInput) -> AccessDecision:
    """Ask whether the approver may decide about the model; the answer is evidence, so a deny does not raise."""
    request = AccessRequest(
        principal=decision.approver,
        action="promote",
        resource=fed.model_resource,
        context={"identity": decision.identity},
    )
    return fed.authorizer.decide(request)


def _approve(fed: Federation, settled: Settled, decision: DecisionInput) -> Outcome:
    from tier1.governance.promotion import require_promotable

    access = _ask_policy(fed, decision)
    require_promotable(promotion_evidence(fed, settled.version, decision, access))
    _append_decision(fed, settled, decision, access)
    sync_views(fed)
    log.info("version.approved", version=settled.version, approver=decision.approver, identity=decision.identity)
    return _outcome(fed, "approved", settled.version, decision.reason)


def promotion_evidence(fed: Federation, number: int, decision: DecisionInput, access: AccessDecision | None):
    """Collect what the promotion checklist looks at, from the chain and the lineage outbox.

    Approving a version makes everything it is built on champion as well, so trainers, lineage and gates are those of
    every version from the champion (exclusive) to the decided one.
    """
    from tier1.governance.promotion import PromotionEvidence

    state, entries = fed.chain.state(), fed.chain.entries()
    view = state.versions[number]
    promoted = [entries[each.seq] for each in view.lineage() if each.version > 0 and not _counts(state, each.version)]
    sealed = entries[view.seq]
    candidates = [each.entry.body.candidate for each in promoted] or [sealed.entry.body.candidate]
    lineage = tuple(dict.fromkeys(name for candidate in candidates for name in candidate.lineage))
    return PromotionEvidence(
        version=number,
        manifest_digest=view.digest,
        candidate_digest=sealed.entry.body.candidate.digest(),
        model=fed.model_resource,
        trainers=frozenset(name for candidate in candidates for name in _trainers(candidate)),
        signed_message=sealed.entry.signed_part(),
        signature=sealed.entry.signature,
        signer=sealed.entry.signer,
        trusted=fed.config.identity.trusted,
        decision=decision,
        access=access,
        allow_unverified=fed.config.governance.allow_unverified,
        gate=_passed_gate(sealed) if all(_passed_gate(each) for each in promoted) else None,
        # A promoted version without any record counts as missing, not as having nothing to record.
        lineage=lineage if all(candidate.lineage for candidate in candidates) else (),
        lineage_missing=fed.lineage.missing(lineage),
    )


def _counts(state: ChainState, number: int) -> bool:
    """Tell whether a version is part of what was approved before: the champion or one it is built on."""
    return state.champion.descends_from(number)


def _trainers(candidate: Candidate) -> set[str]:
    return {candidate.trainer} | {dense.trainer for dense in candidate.inputs.round}


def _passed_gate(sealed: Sealed) -> GateRecord | None:
    return next((one.gate for one in reversed(sealed.entry.body.tries) if one.outcome == "passed"), None)


def _append_decision(fed: Federation, settled: Settled, decision: DecisionInput, access: AccessDecision) -> None:
    from tier1.loops.views import record_promotion

    lineage = record_promotion(fed, settled.version, decision, access)
    while True:
        state = fed.chain.state()
        voided = state.successors(settled.version)[1:] if decision.verdict == "reject" else []
        body = Decision(
            verdict=decision.verdict,
            version=settled.version,
            manifest=settled.manifest,
            approver=decision.approver,
            verified=decision.verified,
            channel=decision.channel,
            reason=decision.reason,
            token_sha256=decision.token_sha256,
            authorisation=access.id,
            lineage=list(lineage),
            refolded=[view.digest for view in voided],
            created_at=now_text(),
        )
        try:
            fed.chain.append(body, state.next_seq)
            failpoint("decide.after_append")
            return
        except ChainConflict:  # the decision is about the version, not the head: say it again
            log.info("decision.lost_race", version=settled.version)


def _reject(fed: Federation, settled: Settled, decision: DecisionInput) -> Outcome:
    access = _ask_policy(fed, decision)
    if not access.allowed:
        return _outcome(
            fed,
            "blocked",
            settled.version,
            f"policy: {decision.approver} may not decide on {fed.model_resource}: {access.reason}",
        )
    if not decision.verified and not fed.config.governance.allow_unverified:
        return _outcome(
            fed,
            "blocked",
            settled.version,
            "identity: unverified and governance.allow_unverified is false: reject with a signed token",
        )
    _append_decision(fed, settled, decision, access)
    log.info("version.rejected", version=settled.version, approver=decision.approver)
    sync_views(fed)
    refold_pending(fed)
    return _outcome(fed, "rejected", settled.version, decision.reason)


def refold_pending(fed: Federation) -> list[int]:
    """Fold again the inputs that a rejection set free, oldest first, each through its own gate.

    Returns:
        The numbers of the new versions.
    """
    from tier1.versions.build import refold

    made: list[int] = []
    while pending := fed.chain.state().pending:
        candidate = pending[0].entry.body.candidate
        state = fed.chain.state()
        again = refold(candidate, state, candidate.rates, blobs=fed.blobs, archive=fed.archive)
        save_candidate(fed.home, again)
        sealed = _settle(fed, again)
        if sealed is not None and isinstance(sealed.entry.body, Version):
            made.append(sealed.entry.body.version)
        sync_views(fed)
    return made


def _reference(digest: str, candidate: Candidate) -> CandidateRef:
    return CandidateRef(
        digest=digest,
        parent_version=candidate.parent_version,
        n_accepted=len(candidate.accepted),
        n_refused=len(candidate.refused),
    )

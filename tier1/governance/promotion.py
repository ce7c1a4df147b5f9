"""What must hold before a version becomes champion: a checklist over evidence, with no I/O of its own.

    promotable ⇔ approved ∧ identified ∧ allowed ∧ approver ∉ trainers ∧ signed ∧ lineage ∧ evaluated ∧ gate passed

MLflow protects none of this: whoever may edit a model may set its aliases. So the aliases follow the manifest chain,
and a decision enters the chain only past this list. Each missing item has a line of its own, because the person who
reads them is not the one who can repair them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fednested_lib.errors import PromotionBlocked
from fednested_lib.signing import verify
from tier1.governance.approvals import DecisionInput
from tier1.governance.ports import AccessDecision
from tier1.versions.manifest import GateRecord


@dataclass(frozen=True, kw_only=True)
class PromotionEvidence:
    """Everything the checklist looks at.

    Args:
        version: number of the version.
        manifest_digest: digest of its chain entry.
        candidate_digest: digest of the candidate in that entry; gate results are bound to it.
        model: resource name, ``model:<name>``.
        trainers: principals that made the version: the fold's, and the training run's if one was folded in.
        signed_message: bytes that the entry's signature covers.
        signature: the entry's signature, hex; None when it has none.
        signer: public key that made the signature; None when the entry names none.
        trusted: public key → name of those who may sign chain entries.
        decision: the approver's decision.
        access: the policy's answer to `promote` for the approver; None when it was not asked.
        allow_unverified: whether a decision without a verified identity may promote.
        gate: result of the automatic gate; None when the version was not evaluated.
        lineage: ids of the version's lineage records, as its manifest names them.
        lineage_missing: those of them that the lineage outbox does not hold.
    """

    version: int
    manifest_digest: str
    candidate_digest: str
    model: str
    trainers: frozenset[str]
    signed_message: bytes
    signature: str | None
    signer: str | None
    trusted: Mapping[str, str]
    decision: DecisionInput
    access: AccessDecision | None
    allow_unverified: bool
    gate: GateRecord | None
    lineage: tuple[str, ...]
    lineage_missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One missing requirement: a machine-readable item and one line for a person."""

    item: str
    line: str


def check_promotion(evidence: PromotionEvidence) -> list[Finding]:
    """Return every requirement of promotion that this version lacks; empty means promotable."""
    return [Finding(item=item, line=line) for item, check in CHECKS.items() for line in check(evidence)]


def require_promotable(evidence: PromotionEvidence) -> None:
    """Let a promotable version pass.

    Raises:
        PromotionBlocked: with one line per missing requirement.
    """
    findings = check_promotion(evidence)
    if findings:
        lines = "".join(f"\n  {finding.item}: {finding.line}" for finding in findings)
        raise PromotionBlocked(
            f"version {evidence.version} ({_short(evidence.manifest_digest)}) is not promotable:{lines}"
        )


def _decision(evidence: PromotionEvidence) -> Iterator[str]:
    decision = evidence.decision
    if decision.manifest_digest != evidence.manifest_digest:
        about, wanted = _short(decision.manifest_digest), _short(evidence.manifest_digest)
        yield f"the decision is about manifest {about}, not {wanted}: decide on this version"
    if decision.verdict != "approve":
        yield f"{decision.approver} decided {decision.verdict!r}, promotion needs 'approve'"


def _identity(evidence: PromotionEvidence) -> Iterator[str]:
    decision = evidence.decision
    if not decision.verified and not evidence.allow_unverified:
        yield (
            f"identity of {decision.approver!r} is unverified (a bare {decision.channel} value) and "
            "governance.allow_unverified is false: approve with a signed token"
        )


def _policy(evidence: PromotionEvidence) -> Iterator[str]:
    approver, access = evidence.decision.approver, evidence.access
    if access is None:
        yield f"the policy was not asked whether {approver} may promote {evidence.model}: ask it first"
        return
    asked = (access.request.principal, access.request.action, access.request.resource)
    if asked != (approver, "promote", evidence.model):
        wanted = (approver, "promote", evidence.model)
        yield f"policy decision {_short(access.id)} is about {asked}, not {wanted}: ask again"
    elif not access.allowed:
        yield (
            f"{approver} may not promote {evidence.model}: {access.reason} (decision {_short(access.id)}): "
            "let somebody approve whom the policy allows"
        )


def _two_persons(evidence: PromotionEvidence) -> Iterator[str]:
    decision = evidence.decision
    if not evidence.trainers:
        yield "the manifest records no trainer, so nobody can tell that approver and trainer differ: record the trainer"
    elif decision.approver in evidence.trainers:
        yield f"{decision.approver} trained this version and approves it: another person must approve"
    elif decision.public_key is not None and decision.public_key == evidence.signer:
        key = _short(decision.public_key)
        yield f"key {key} signed this version and its approval by {decision.approver}: another key must approve"


def _signature(evidence: PromotionEvidence) -> Iterator[str]:
    manifest = f"manifest {_short(evidence.manifest_digest)}"
    if not evidence.signature or not evidence.signer:
        yield f"{manifest} carries no signature: commit it with a trusted key"
    elif evidence.signer not in evidence.trusted:
        trusted = ", ".join(sorted(evidence.trusted.values())) or "none"
        yield f"{manifest} is signed by the foreign key {_short(evidence.signer)}: identity.trusted names {trusted}"
    elif not verify(evidence.signer, evidence.signature, evidence.signed_message):
        yield f"{manifest} was altered: the signature of {evidence.trusted[evidence.signer]} does not match, replay it"


def _lineage(evidence: PromotionEvidence) -> Iterator[str]:
    missing, named = evidence.lineage_missing, evidence.lineage
    if not named:
        yield f"manifest {_short(evidence.manifest_digest)} names no lineage records: run the loop that made it again"
    elif missing:
        yield (
            f"{len(missing)} of {len(named)} lineage records are not in the outbox, first {_short(missing[0])}: "
            "restore lineage.jsonl or record the run again"
        )


def _evaluation(evidence: PromotionEvidence) -> Iterator[str]:
    gate = evidence.gate
    if gate is None or not gate.rows:
        yield f"version {evidence.version} has no evaluation report: run evaluate_and_promote"
    elif gate.candidate != evidence.candidate_digest:
        about, wanted = _short(gate.candidate), _short(evidence.candidate_digest)
        yield f"the evaluation report is about candidate {about}, not {wanted}: evaluate this one"


def _gate(evidence: PromotionEvidence) -> Iterator[str]:
    gate = evidence.gate
    if gate is not None and not (gate.passed and all(row.passed for row in gate.rows)):
        failed = ", ".join(row.suite for row in gate.rows if not row.passed) or "none named"
        yield f"the automatic gate failed ({gate.reason}; suites: {failed}): such a version is never promoted"


def _short(digest: str) -> str:
    return digest[:12]


CHECKS: Mapping[str, Callable[[PromotionEvidence], Iterator[str]]] = {
    "decision": _decision,
    "identity": _identity,
    "policy": _policy,
    "two_persons": _two_persons,
    "signature": _signature,
    "lineage": _lineage,
    "evaluation": _evaluation,
    "gate": _gate,
}

"""Nothing is promoted without every item of the checklist; each missing one is named."""

from __future__ import annotations

import dataclasses

import pytest

from fednested_lib.errors import PromotionBlocked
from fednested_lib.signing import Signer
from tier1.governance.approvals import DecisionInput, issue, parse_decision
from tier1.governance.ports import AccessDecision, AccessRequest
from tier1.governance.promotion import PromotionEvidence, check_promotion, require_promotable
from tier1.versions.manifest import GateRecord, SuiteChange

COMMITTER, SAM, EVE = (Signer.from_seed(bytes([seed]) * 32) for seed in (1, 2, 3))
MANIFEST, CANDIDATE = "ab" * 32, "cd" * 32
MESSAGE = b'{"seq":7}'


def _decision(approver: str = "sam", verdict: str = "approve", signer: Signer = SAM) -> DecisionInput:
    token = issue(signer, verdict=verdict, manifest_digest=MANIFEST, approver=approver, issued_at=1)
    return parse_decision(token, {signer.public_key: approver}, manifest_digest=MANIFEST)


def _bare() -> DecisionInput:
    return parse_decision("approve", {}, manifest_digest=MANIFEST, console_user="sam")


def _access(principal: str = "sam", *, allowed: bool = True, action: str = "promote", resource: str = "model:moe"):
    request = AccessRequest(principal=principal, action=action, resource=resource)
    return AccessDecision(request=request, allowed=allowed, reason="no rule allows it", rule=None, policy="test")


def _gate(*, passed: bool = True, candidate: str = CANDIDATE, rows: int = 1) -> GateRecord:
    row = SuiteChange(suite="hamlet", before=2.0, after=1.9 if passed else 2.5, bound=0.05, passed=passed)
    return GateRecord(candidate=candidate, passed=passed, reason="bound 0.05", rows=[row] * rows)


GOOD = PromotionEvidence(
    version=3,
    manifest_digest=MANIFEST,
    candidate_digest=CANDIDATE,
    model="model:moe",
    trainers=frozenset({"svc-trainer"}),
    signed_message=MESSAGE,
    signature=COMMITTER.sign(MESSAGE),
    signer=COMMITTER.public_key,
    trusted={COMMITTER.public_key: "tier1"},
    decision=_decision(),
    access=_access(),
    allow_unverified=False,
    gate=_gate(),
    lineage=("e1" * 32, "e2" * 32),
    lineage_missing=(),
)


def test_a_version_with_everything_is_promotable():
    """The checklist has no objection to a version that lacks nothing."""
    assert check_promotion(GOOD) == []
    require_promotable(GOOD)


BLOCKS = {
    "policy deny": ({"access": _access(allowed=False)}, "policy", "sam may not promote model:moe: no rule allows it"),
    "policy not asked": ({"access": None}, "policy", "was not asked whether sam may promote"),
    "policy asked about another": ({"access": _access("kim")}, "policy", "is about .*'kim'"),
    "policy asked for another action": ({"access": _access(action="read")}, "policy", "is about .*'read'"),
    "policy asked for another model": ({"access": _access(resource="model:x")}, "policy", "is about .*'model:x'"),
    "approver is trainer": ({"trainers": frozenset({"svc-trainer", "sam"})}, "two_persons", "sam trained this version"),
    "trainer unknown": ({"trainers": frozenset()}, "two_persons", "records no trainer"),
    "approver used the committer's key": (
        {"decision": _decision(signer=COMMITTER)},
        "two_persons",
        "signed this version and its approval by sam",
    ),
    "no signature": ({"signature": None}, "signature", "manifest abababababab carries no signature"),
    "no signer": ({"signer": None}, "signature", "carries no signature"),
    "foreign signature": (
        {"signature": EVE.sign(MESSAGE), "signer": EVE.public_key},
        "signature",
        f"foreign key {EVE.public_key[:12]}: identity.trusted names tier1",
    ),
    "altered manifest": ({"signed_message": MESSAGE + b" "}, "signature", "was altered: the signature of tier1"),
    "no lineage": ({"lineage": ()}, "lineage", "names no lineage records"),
    "lineage lost": (
        {"lineage_missing": ("e2" * 32,)},
        "lineage",
        "1 of 2 lineage records are not in the outbox, first e2e2",
    ),
    "no evaluation": ({"gate": None}, "evaluation", "version 3 has no evaluation report"),
    "empty evaluation": ({"gate": _gate(rows=0)}, "evaluation", "has no evaluation report"),
    "evaluation of another": ({"gate": _gate(candidate=MANIFEST)}, "evaluation", "is about candidate abababababab"),
    "gate failed": ({"gate": _gate(passed=False)}, "gate", "the automatic gate failed .*hamlet"),
    "unverified identity": ({"decision": _bare()}, "identity", "identity of 'sam' is unverified .*signed token"),
    "rejected": ({"decision": _decision(verdict="reject")}, "decision", "sam decided 'reject'"),
    "decision about another": (
        {"decision": dataclasses.replace(_decision(), manifest_digest=CANDIDATE)},
        "decision",
        "about manifest cdcdcdcdcdcd, not abababababab",
    ),
}


@pytest.mark.parametrize(("change", "item", "line"), BLOCKS.values(), ids=BLOCKS)
def test_a_missing_item_blocks_with_its_own_line(change: dict, item: str, line: str):
    """Each missing requirement alone blocks, under its own name and with the values in the line."""
    evidence = dataclasses.replace(GOOD, **change)
    assert [finding.item for finding in check_promotion(evidence)] == [item]
    with pytest.raises(PromotionBlocked, match=rf"version 3 \(abababababab\) is not promotable:\n  {item}: .*{line}"):
        require_promotable(evidence)


def test_every_missing_item_is_named_at_once():
    """A person sees all that is missing, not the first of it."""
    evidence = dataclasses.replace(
        GOOD, decision=_bare(), access=None, trainers=frozenset({"sam"}), signature=None, lineage=(), gate=None
    )
    assert [finding.item for finding in check_promotion(evidence)] == [
        "identity", "policy", "two_persons", "signature", "lineage", "evaluation"
    ]  # fmt: skip


def test_an_unverified_identity_promotes_only_where_allowed():
    """governance.allow_unverified lets a bare value pass, and nothing else with it."""
    evidence = dataclasses.replace(GOOD, decision=_bare(), allow_unverified=True)
    assert check_promotion(evidence) == []
    assert check_promotion(dataclasses.replace(evidence, access=_access(allowed=False)))

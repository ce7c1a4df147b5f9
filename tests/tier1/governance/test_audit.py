"""Nobody gets access without a record of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fednested_lib.errors import PolicyDenied
from tier1.governance.audit import AuditedAuthorizer, require_access
from tier1.governance.ports import AccessDecision, AccessRequest

REQUEST = AccessRequest(principal="sam", action="promote", resource="model:moe")


class Answering:
    """An authorizer that allows, denies, lies about the question, or breaks."""

    def __init__(self, answer):
        self.answer = answer

    def decide(self, request: AccessRequest) -> AccessDecision:
        return self.answer(request)


def _decision(request: AccessRequest, *, allowed=True) -> AccessDecision:
    return AccessDecision(request=request, allowed=allowed, reason="rule r", rule="r", policy="test")


def _audited(answer, path: Path) -> AuditedAuthorizer:
    return AuditedAuthorizer(Answering(answer), path, now=lambda: 17.0)


def test_a_decision_is_on_disk_before_it_is_given(tmp_path: Path):
    """Every decision, allow and deny, leaves one line with its id and time."""
    path = tmp_path / "audit.jsonl"
    allowed = _audited(_decision, path).decide(REQUEST)
    denied = _audited(lambda request: _decision(request, allowed=False), path).decide(REQUEST)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["id"], line["allowed"], line["at"]) for line in lines] == [
        (allowed.id, True, 17.0),
        (denied.id, False, 17.0),
    ]


@pytest.mark.parametrize("unwritable", ["/dev/full", "/proc/no/audit.jsonl"])
def test_no_audit_no_access(unwritable: str):
    """If the record cannot be written, an allow turns into a deny that says so."""
    decision = _audited(_decision, Path(unwritable)).decide(REQUEST)
    assert not decision.allowed
    assert "cannot be recorded" in decision.reason


@pytest.mark.parametrize(
    "answer",
    [
        lambda request: 1 / 0,
        lambda request: None,
        lambda request: {"allowed": True},
        lambda request: _decision(request, allowed="yes"),
        lambda request: _decision(request, allowed=None),
        lambda request: _decision(AccessRequest(principal="eve", action="promote", resource="model:moe")),
    ],
    ids=["raises", "none", "another type", "a word", "undecided", "another question"],
)
def test_whatever_is_not_a_clear_yes_is_a_no(answer, tmp_path: Path):
    """A broken authorizer denies, and its failure is recorded as a deny."""
    path = tmp_path / "audit.jsonl"
    decision = _audited(answer, path).decide(REQUEST)
    assert decision.allowed is False
    assert json.loads(path.read_text())["allowed"] is False


def test_require_access_names_who_what_and_why(tmp_path: Path):
    """A denied person reads principal, action, resource and reason in one line; an allowed one gets the decision."""
    denying = _audited(lambda request: _decision(request, allowed=False), tmp_path / "audit.jsonl")
    with pytest.raises(PolicyDenied, match=r"'sam' may not promote 'model:moe': rule r"):
        require_access(denying, REQUEST)
    assert require_access(_audited(_decision, tmp_path / "audit.jsonl"), REQUEST).allowed

"""The policy file denies by default, denies what it does not understand, and is refused when it is ambiguous."""

from __future__ import annotations

from pathlib import Path

import pytest

from fednested_lib.errors import ConfigError
from tier1.governance.policy_file import PolicyFile
from tier1.governance.ports import AccessDecision, AccessRequest

POLICY = """
version: 1
groups:
  trainers: [svc-trainer]
  secops: [sam]
allow:
  - {id: train, groups: [trainers], actions: [read, train], resources: ["dataset:clinic-a/*"], purposes: [core-update]}
  - {id: promote, groups: [secops], actions: [promote], resources: ["model:moe"]}
  - {id: anyone-reads, groups: [public], actions: [read], resources: ["topic:*"]}
deny:
  - {id: no-notes, groups: [public], actions: [read, train], resources: ["dataset:clinic-a/notes*"]}
  - {id: no-marketing, users: [eve], actions: [read], resources: ["topic:*"], purposes: [marketing]}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "policy.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def _decide(path: Path, principal: str, action: str, resource: str, **context: str) -> AccessDecision:
    request = AccessRequest(principal=principal, action=action, resource=resource, context=context)
    return PolicyFile(path).decide(request)


@pytest.mark.parametrize(
    ("principal", "action", "resource", "context", "allowed", "rule"),
    [
        ("svc-trainer", "train", "dataset:clinic-a/2026.jsonl", {"purpose": "core-update"}, True, "train"),
        ("svc-trainer", "train", "dataset:clinic-a/2026.jsonl", {"purpose": "marketing"}, False, None),
        ("svc-trainer", "train", "dataset:clinic-a/2026.jsonl", {}, False, None),
        ("svc-trainer", "train", "dataset:clinic-b/2026.jsonl", {"purpose": "core-update"}, False, None),
        ("svc-trainer", "train", "dataset:clinic-a/notes/1", {"purpose": "core-update"}, False, "no-notes"),
        ("svc-trainer", "promote", "model:moe", {}, False, None),
        ("sam", "promote", "model:moe", {}, True, "promote"),
        ("sam", "promote", "model:moe-2", {}, False, None),
        ("Sam", "promote", "model:moe", {}, False, None),
        ("nobody", "read", "topic:updates.tier1", {}, True, "anyone-reads"),
        ("nobody", "publish", "topic:updates.tier1", {}, False, None),
        ("eve", "read", "topic:updates.tier1", {"purpose": "audit"}, True, "anyone-reads"),
        ("eve", "read", "topic:updates.tier1", {"purpose": "marketing"}, False, "no-marketing"),
        ("eve", "read", "topic:updates.tier1", {}, False, "no-marketing"),
    ],
)
def test_rules_decide(write, principal, action, resource, context, allowed, rule):
    """Default deny, deny wins, prefixes end where they say, purposes fail closed on both sides."""
    decision = _decide(write(POLICY), principal, action, resource, **context)
    assert (decision.allowed, decision.rule) == (allowed, rule)


@pytest.mark.parametrize(
    ("principal", "action", "resource"),
    [
        ("", "read", "topic:t"),
        (" ", "read", "topic:t"),
        ("sam", "delete", "topic:t"),
        ("sam", "read", "topic:*"),
        ("sam", "read", "topic:"),
        ("sam", "read", "table:t"),
        ("sam", "read", "topic"),
        ("sam", "read", "topic:a/../t"),
        ("sam", "read", "topic:a//t"),
        ("sam", "read", None),
        (None, "read", "topic:t"),
    ],
)
def test_an_undecidable_request_is_denied(write, principal, action, resource):
    """What names nobody, no known action or no single resource is denied, even where everybody may read everything."""
    decision = _decide(write(POLICY), principal, action, resource)
    assert not decision.allowed
    assert decision.rule is None


def test_a_decision_is_named_by_its_content(write):
    """The same question to the same policy has one id; another answer, question or policy has another."""
    path = write(POLICY)
    first = _decide(path, "sam", "promote", "model:moe")
    assert first.id == _decide(path, "sam", "promote", "model:moe").id
    assert first.id != _decide(path, "sam", "promote", "model:moe", purpose="x").id
    again = _decide(write(POLICY + "# a comment changes nothing\n"), "sam", "promote", "model:moe")
    assert first.id == again.id
    changed = _decide(write(POLICY.replace("[sam]", "[sam, kim]")), "sam", "promote", "model:moe")
    assert first.id != changed.id


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version: 1", "version: 1\nallow_all: true", "unknown key allow_all"),
        ("actions: [promote]", "actions: [promote], verbs: [promote]", r"unknown key allow\.1\.verbs"),
        ("groups: [secops]", "groups: [secop]", "group secop, which is not under groups"),
        ("groups: [secops], ", "", "names nobody"),
        ('resources: ["model:moe"]', 'resources: ["model:m*e"]', r"allow\.1\.resources\.0"),
        ('resources: ["model:moe"]', 'resources: ["*"]', r"allow\.1\.resources\.0"),
        ("actions: [promote]", "actions: [sudo]", r"allow\.1\.actions\.0"),
        ("id: promote", "id: train", "rule id train is used 2 times"),
        ("version: 1", "version: 2", "version"),
        ("deny:", "allow:", "key allow stands 2 times"),
        ("id: promote,", "id: promote, users: [], users: [eve],", "key users stands 2 times"),
        ("  secops: [sam]", "  public: [sam]\n  secops: [sam]", "group public holds everybody"),
    ],
)
def test_a_wrong_policy_is_refused_by_name(write, old, new, message):
    """A policy that a person may have meant otherwise is refused, and the message names the place."""
    assert old in POLICY
    path = write(POLICY.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        PolicyFile(path)


def test_a_missing_policy_is_refused(tmp_path):
    """No policy is not an empty policy: starting without one is an error that names the file."""
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        PolicyFile(tmp_path / "nowhere.yaml")

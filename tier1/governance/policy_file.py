"""A default-deny policy in one YAML file: the laptop's `Authorizer`.

    version: 1
    groups:
      trainers: [svc-trainer]
      secops: [sam, kim]
    allow:
      - {id: train, groups: [trainers], actions: [read, train], resources: ["dataset:clinic-a/*"], purposes: [study-7]}
      - {id: promote, groups: [secops], actions: [promote], resources: ["model:*"]}
    deny:
      - {id: contractors, users: [eve], actions: [read, train], resources: ["dataset:*"]}

    allowed(request) = some allow rule matches ∧ no deny rule matches

A rule matches when user or group, action, resource and purpose all match. The group `public` holds everybody. A
resource is an exact name or a prefix followed by `*`. A rule without purposes matches any purpose; an allow rule with
purposes needs the request to state one of them, a deny rule with purposes also matches a request that states none. The
order of rules means nothing. Names and the deny-wins rule are Apache Ranger's, so that a policy can move there.

The file is read once, when the authorizer is made: make a new one to see a change.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fednested_lib.config import load_yaml
from fednested_lib.signing import canonical_json, sha256_hex
from tier1.governance.ports import ACTIONS, RESOURCE_KINDS, AccessDecision, AccessRequest, Action

EVERYBODY = "public"
KINDS = "|".join(RESOURCE_KINDS)
RESOURCE = re.compile(rf"^({KINDS}):[^*\s]+$")
COMMAND = "fednested init-config tier1"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,127}$")]
Pattern = Annotated[str, Field(pattern=rf"^({KINDS}):([^*\s]+\*?|\*)$")]


class Rule(BaseModel):
    """Who, what, on which resources, for which purposes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Name
    users: list[Name] = []
    groups: list[Name] = []
    actions: list[Action] = Field(min_length=1)
    resources: list[Pattern] = Field(min_length=1)
    purposes: list[Name] = []

    @model_validator(mode="after")
    def _names_somebody(self) -> Rule:
        if not self.users and not self.groups:
            raise ValueError(
                f"rule {self.id} names nobody: add users or groups (the group {EVERYBODY} holds everybody)"
            )
        return self


class Policy(BaseModel):
    """The policy document."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: Literal[1]
    groups: dict[Name, list[Name]] = {}
    allow: list[Rule] = []
    deny: list[Rule] = []

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        ids = [rule.id for rule in (*self.allow, *self.deny)]
        for rule_id in ids:
            if ids.count(rule_id) > 1:
                raise ValueError(f"rule id {rule_id} is used {ids.count(rule_id)} times: give every rule its own id")
        if EVERYBODY in self.groups:
            raise ValueError(f"group {EVERYBODY} holds everybody and cannot be defined: choose another name")
        for rule in (*self.allow, *self.deny):
            for group in rule.groups:
                if group != EVERYBODY and group not in self.groups:
                    raise ValueError(
                        f"rule {rule.id} names group {group}, which is not under groups: define it or fix its spelling"
                    )
        return self

    def groups_of(self, principal: str) -> frozenset[str]:
        """Return the groups that this principal is in."""
        return frozenset({EVERYBODY, *(group for group, members in self.groups.items() if principal in members)})


class PolicyFile:
    """Authorizer over one policy file.

    Raises:
        ConfigError: missing file, not YAML, a key twice, an unknown key, a wrong value.
    """

    def __init__(self, path: str | os.PathLike):
        self.policy = load_policy(path)
        self.identity = "file:" + sha256_hex(canonical_json(self.policy.model_dump(mode="json")))

    def decide(self, request: AccessRequest) -> AccessDecision:
        """Answer by the rules; a request that cannot be understood is denied."""
        allowed, rule, reason = _judge(self.policy, request)
        return AccessDecision(request=request, allowed=allowed, reason=reason, rule=rule, policy=self.identity)


def load_policy(path: str | os.PathLike) -> Policy:
    """Read and check a policy file.

    Raises:
        ConfigError: missing file, not YAML, a key twice, an unknown key, a wrong value.
    """
    return load_yaml(path, Policy, command=COMMAND)


def _judge(policy: Policy, request: AccessRequest) -> tuple[bool, str | None, str]:
    problem = _malformed(request)
    if problem:
        return False, None, problem
    denying = _first(policy.deny, policy, request, purpose_needed=False)
    if denying:
        return False, denying.id, f"rule {denying.id} denies it"
    allowing = _first(policy.allow, policy, request, purpose_needed=True)
    if allowing:
        return True, allowing.id, f"rule {allowing.id} allows it"
    return False, None, "no rule allows it"


def _malformed(request: AccessRequest) -> str | None:
    if not isinstance(request.principal, str) or not request.principal.strip():
        return "the principal has no name"
    if request.action not in ACTIONS:
        return f"action {request.action!r} is not one of {', '.join(sorted(ACTIONS))}"
    if not isinstance(request.resource, str) or not RESOURCE.match(request.resource):
        return f"resource {request.resource!r} is not {'|'.join(RESOURCE_KINDS)}:<name>"
    segments = request.resource.partition(":")[2].split("/")
    if any(segment in ("", ".", "..") for segment in segments):
        return f"resource {request.resource!r} has an empty, '.' or '..' segment: name it directly"
    return None


def _first(rules: Iterable[Rule], policy: Policy, request: AccessRequest, *, purpose_needed: bool) -> Rule | None:
    groups = policy.groups_of(request.principal)
    return next((rule for rule in rules if _matches(rule, groups, request, purpose_needed=purpose_needed)), None)


def _matches(rule: Rule, groups: frozenset[str], request: AccessRequest, *, purpose_needed: bool) -> bool:
    return (
        (request.principal in rule.users or not groups.isdisjoint(rule.groups))
        and request.action in rule.actions
        and any(_covers(pattern, request.resource) for pattern in rule.resources)
        and _purpose_matches(rule, request.context.get("purpose"), purpose_needed=purpose_needed)
    )


def _covers(pattern: str, resource: str) -> bool:
    return resource.startswith(pattern[:-1]) if pattern.endswith("*") else resource == pattern


def _purpose_matches(rule: Rule, purpose: str | None, *, purpose_needed: bool) -> bool:
    if not rule.purposes:
        return True
    return not purpose_needed if purpose is None else purpose in rule.purposes

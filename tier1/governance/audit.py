"""Audit or deny: a decision is on disk before anyone acts on it.

The record is appended and synced first; if it cannot be written, the answer is no, whatever the policy said. The same
holds when the policy raises instead of answering. The order and the rule follow Apache Ranger's enforcement points,
minus their habit of granting when the audit sink is down.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable

import structlog

from fednested_lib.errors import FednestedError, PolicyDenied
from tier1.governance.journal import Journal
from tier1.governance.ports import AccessDecision, AccessRequest, Authorizer

log = structlog.get_logger(__name__)


class AuditedAuthorizer:
    """An `Authorizer` that writes every decision down before it gives it.

    Args:
        authorizer: who decides.
        path: the audit JSONL.
        now: clock, seconds since the epoch.
    """

    def __init__(self, authorizer: Authorizer, path: str | os.PathLike, *, now: Callable[[], float] = time.time):
        self._authorizer = authorizer
        self._journal = Journal(path)
        self._now = now

    def decide(self, request: AccessRequest) -> AccessDecision:
        """Decide and record; never raises, and whatever goes wrong is a deny."""
        decision = self._ask(request)
        try:
            self._journal.append([{"at": self._now(), **decision.to_document()}])
        except (FednestedError, TypeError, ValueError) as error:
            decision = _denied(request, decision.policy, f"the decision cannot be recorded: {error}")
        log.info(
            "access.decided",
            principal=request.principal,
            action=request.action,
            resource=request.resource,
            allowed=decision.allowed,
            rule=decision.rule,
        )
        return decision

    def _ask(self, request: AccessRequest) -> AccessDecision:
        try:
            decision = self._authorizer.decide(request)
        except Exception as error:  # an adapter may fail in ways of its own; none of them may grant access
            return _denied(request, "none", f"the policy could not decide ({type(error).__name__}: {error})")
        answered = isinstance(decision, AccessDecision) and decision.request == request
        if not answered or not isinstance(decision.allowed, bool):
            return _denied(request, "none", "the policy could not decide: its answer is not one to this question")
        return decision


def require_access(authorizer: Authorizer, request: AccessRequest) -> AccessDecision:
    """Return the decision if it allows the request.

    Raises:
        PolicyDenied: with principal, action, resource and the policy's reason.
    """
    decision = authorizer.decide(request)
    if not decision.allowed:
        raise PolicyDenied(
            f"{request.principal!r} may not {request.action} {request.resource!r}: {decision.reason} "
            f"(decision {decision.id[:12]}): ask the owner of the policy for a rule"
        )
    return decision


def _denied(request: AccessRequest, policy: str, reason: str) -> AccessDecision:
    return AccessDecision(request=dataclasses.replace(request), allowed=False, reason=reason, rule=None, policy=policy)

"""Measure a candidate on every suite, each suite by itself, so that many machines can share the work.

Nothing is decided here. What is measured is kept, and the automatic gate of `evaluate_and_promote` finds it; a suite
that is missing it measures itself, or fails: a suite that could not be measured never counts as passed.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from tier1.federation import Federation
from tier1.loops.evaluate_and_promote import newest_candidate
from tier1.loops.gate_candidate import measure, suite_registry
from tier1.loops.records import SuiteLoss, SuitesMeasured
from tier1.versions.candidates import load_candidate, snapshot_of


def plan_suites(fed: Federation, candidate: str) -> tuple[str, list[str]]:
    """Return a candidate, the newest unsettled one if it is empty, and its suites; none of either if none waits."""
    digest = candidate or newest_candidate(fed).digest
    return digest, suite_registry(fed).names() if digest else []


def measure_suite(fed: Federation, candidate: str, suite: str) -> SuiteLoss:
    """Measure a candidate and its parent on one suite, and keep it for the gate.

    Raises:
        DataError: the suite was altered, or is unusable.
        SnapshotError: a blob is missing or corrupt.
    """
    folded = load_candidate(fed.home, candidate)
    parent = fed.chain.state().versions[folded.parent_version].snapshot
    suites = {suite: suite_registry(fed).suite(suite)}
    before, after = (measure(fed, each, suites)[suite].nats_per_token for each in (parent, snapshot_of(folded)))
    return SuiteLoss(suite=suite, before=before, after=after)


def collect(candidate: str, suites: Iterable[str], losses: Iterable[SuiteLoss | None]) -> SuitesMeasured:
    """Say what was measured and what is missing; None stands for a suite whose measuring failed."""
    found = sorted((loss for loss in losses if loss is not None), key=lambda loss: loss.before - loss.after)
    missing = sorted(set(suites) - {loss.suite for loss in found})
    return SuitesMeasured(candidate=candidate, losses=found, missing=missing)


def measured_html(measured: SuitesMeasured) -> str:
    """Return a deck: what is missing, then the losses, the largest rise first."""
    rows = "".join(
        f"<tr><td>{escape(loss.suite)}</td><td>{loss.before:.4f}</td><td>{loss.after:.4f}</td>"
        f"<td>{loss.after - loss.before:+.4f}</td></tr>"
        for loss in measured.losses[:200]
    )
    missing = ", ".join(map(escape, measured.missing[:200])) or "none"
    head = "<tr><th>suite</th><th>before</th><th>after</th><th>change</th></tr>"
    return f"<p>Missing: {missing}. Losses are nats per token on held-out text.</p><table>{head}{rows}</table>"

"""The automatic gate: a candidate must not forget.

    passed  ⇔  for every suite s:  loss_after(s) − loss_before(s) ≤ max_regression        (nats per token)

A suite that was measured before and not after fails, and so does a loss that is not finite: what cannot be shown is not
promoted. Losses are compared, never averaged over suites, because a mean hides one forgotten domain behind the gains of
the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tier1.evaluation.suites import SuiteResult


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """One suite's losses in nats per token; None is a loss that is missing or not finite."""

    suite: str
    before: float | None
    after: float | None
    change: float | None
    bound: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """The gate's verdict and one row per suite, in the order of their names."""

    passed: bool
    rows: tuple[GateRow, ...]

    @property
    def reason(self) -> str:
        """One line: what failed, or that nothing did."""
        failed = [_sentence(row) for row in self.rows if not row.passed]
        if failed:
            return "; ".join(failed)
        return f"all {len(self.rows)} suites within their bound" if self.rows else "no suite was measured"


def judge(before: Mapping[str, SuiteResult], after: Mapping[str, SuiteResult], *, max_regression: float) -> GateReport:
    """Compare a candidate with its parent.

    Args:
        before: Suite name → result of the parent.
        after: Suite name → result of the candidate; a suite that only it has must be finite and is otherwise free.
        max_regression: Largest allowed rise of any suite's loss, nats per token, ≥ 0.

    Returns:
        The report; no suite at all is a failure.
    """
    assert max_regression >= 0
    rows = tuple(
        _row(suite, _finite(before.get(suite)), _finite(after.get(suite)), suite in before, max_regression)
        for suite in sorted({*before, *after})
    )
    return GateReport(passed=bool(rows) and all(row.passed for row in rows), rows=rows)


def _row(suite: str, before: float | None, after: float | None, has_before: bool, bound: float) -> GateRow:
    change = None if before is None or after is None else after - before
    # Only a suite registered since the parent was measured may lack a comparison.
    passed = after is not None and (not has_before or (change is not None and change <= bound))
    return GateRow(suite=suite, before=before, after=after, change=change, bound=bound, passed=passed)


def _finite(result: SuiteResult | None) -> float | None:
    return result.nats_per_token if result is not None and math.isfinite(result.nats_per_token) else None


def _sentence(row: GateRow) -> str:
    if row.change is None:
        when = "of the candidate" if row.after is None else "of its parent"
        return f"suite {row.suite}: loss {when} is missing or not finite, needs a finite one"
    return f"suite {row.suite}: loss rose by {row.change:.4f} nats per token, bound {row.bound:g}"

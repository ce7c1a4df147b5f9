"""The automatic gate: a candidate must not forget.

    passed  ⇔  for every suite s:  rise_s ≤ bound_s,        rise_s = loss_after(s) − loss_before(s)   (nats per token)

What is held against the bound is the mean rise, or an end of its 95 % bootstrap interval over the suite's rows
(`bootstrap.py`), suite by suite:

    mean    the rise itself (default)
    low     fails only a rise that is significantly above the bound: for a small suite whose mean is mostly chance
    high    passes only what is significantly within it: for a domain that must not be lost

A suite that was measured before and not after fails, and so does a loss that is not finite, or one of other token rows
than its parent's: what cannot be shown is not promoted. So does `low` or `high` without an interval. Losses are
compared, never averaged over suites, because a mean hides one forgotten domain behind the gains of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tier1.evaluation.bootstrap import interval
from tier1.evaluation.suites import SuiteResult

JudgedBy = Literal["low", "mean", "high"]
Interval = tuple[float, float]
NAMED_LINES = 5


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Largest allowed rise of a suite's loss, nats per token, ≥ 0, and what is held against it."""

    max_regression: float
    judged_by: JudgedBy = "mean"


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of right guesses, 0..1, and its 95 % interval; None if there is one row."""

    value: float
    interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """One suite's losses in nats per token; None is a loss that is missing or not finite.

    Args:
        suite: its name.
        before: loss of the parent.
        after: loss of the candidate.
        change: the rise.
        bound: largest allowed rise.
        passed: the verdict.
        judged_by: what was held against the bound.
        after_interval: of the candidate's loss.
        change_interval: of the rise, paired by rows; None where the rows of one side are not known.
        accuracy: share of next tokens that the candidate guesses.
        completions: share of completions that it would write itself; None for a suite without.
        worst_lines: where in the suite's file the rows with the largest rises begin, worst first; of a failed suite.
    """

    suite: str
    before: float | None
    after: float | None
    change: float | None
    bound: float
    passed: bool
    judged_by: JudgedBy = "mean"
    after_interval: Interval | None = None
    change_interval: Interval | None = None
    accuracy: Share | None = None
    completions: Share | None = None
    worst_lines: list[int] = field(default_factory=list)


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


def judge(
    before: Mapping[str, SuiteResult],
    after: Mapping[str, SuiteResult],
    *,
    default: Bound,
    bounds: Mapping[str, Bound] | None = None,
) -> GateReport:
    """Compare a candidate with its parent.

    Args:
        before: Suite name → result of the parent.
        after: Suite name → result of the candidate; a suite that only it has must be finite and is otherwise free.
        default: Bound of a suite that has none of its own.
        bounds: Suite name → its own bound.

    Returns:
        The report; no suite at all is a failure.
    """
    rows = tuple(
        _row(suite, before.get(suite), after.get(suite), (bounds or {}).get(suite, default))
        for suite in sorted({*before, *after})
    )
    return GateReport(passed=bool(rows) and all(row.passed for row in rows), rows=rows)


def _row(suite: str, before: SuiteResult | None, after: SuiteResult | None, bound: Bound) -> GateRow:
    assert bound.max_regression >= 0
    old, new = _finite(before), _finite(after)
    comparable = before is None or after is None or before.rows == after.rows
    change = None if old is None or new is None or not comparable else new - old
    rises = _rises(before, after) if change is not None else np.empty(0)
    spread = interval(rises, after.rows) if rises.size else None
    judged = change
    if bound.judged_by != "mean":
        judged = None if spread is None else spread[bound.judged_by == "high"]
    # Only a suite registered since the parent was measured may lack a comparison.
    passed = new is not None and (before is None or (judged is not None and judged <= bound.max_regression))
    return GateRow(
        suite=suite,
        before=old,
        after=new,
        change=change,
        bound=bound.max_regression,
        passed=passed,
        judged_by=bound.judged_by,
        after_interval=interval(np.array(after.row_nats), after.rows) if new is not None and after.rows else None,
        change_interval=spread,
        accuracy=_share(after.row_hits, after.rows) if new is not None else None,
        completions=_share(after.completions, after.rows) if new is not None else None,
        worst_lines=[] if passed or not rises.size else _worst(rises, after.lines),
    )


def _rises(before: SuiteResult, after: SuiteResult) -> np.ndarray:
    return np.array(after.row_nats) - np.array(before.row_nats)


def _worst(rises: np.ndarray, lines: list[int]) -> list[int]:
    order = np.argsort(-rises, kind="stable")[:NAMED_LINES]
    return [lines[i] for i in order if rises[i] > 0]


def _share(right: list[float] | list[int], seed: str) -> Share | None:
    values = np.array(right, dtype=np.float64)
    return Share(value=float(values.mean()), interval=interval(values, seed)) if values.size else None


def _finite(result: SuiteResult | None) -> float | None:
    return result.nats_per_token if result is not None and math.isfinite(result.nats_per_token) else None


def _sentence(row: GateRow) -> str:
    if row.before is not None and row.after is not None and row.change is None:
        return f"suite {row.suite}: measured on other token rows than its parent, needs the same tokenizer"
    if row.change is None:
        when = "of the candidate" if row.after is None else "of its parent"
        return f"suite {row.suite}: loss {when} is missing or not finite, needs a finite one"
    if row.judged_by != "mean" and row.change_interval is None:
        return f"suite {row.suite}: judged by its interval and has fewer than two rows, needs more text"
    said = f"suite {row.suite}: loss rose by {row.change:.4f} nats per token, bound {row.bound:g}"
    if row.change_interval is not None:
        said += f", 95 % interval {row.change_interval[0]:.4f} to {row.change_interval[1]:.4f}"
    if row.judged_by != "mean":
        said += f", judged by its {row.judged_by} end"
    return f"{said}, most from line {', '.join(map(str, row.worst_lines))}" if row.worst_lines else said

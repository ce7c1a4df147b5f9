"""A gate report for people (a table without JavaScript, as Flyte's decks need) and for records (plain JSON types)."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from typing import Any

from tier1.evaluation.gate import GateReport, GateRow

_COLUMNS = ("suite", "before", "after", "change", "bound", "result")


def to_dict(report: GateReport) -> dict[str, Any]:
    """Return the report as JSON types; a loss that is missing or not finite is null."""
    return {"passed": report.passed, "reason": report.reason, "rows": [asdict(row) for row in report.rows]}


def to_html(report: GateReport) -> str:
    """Return one heading, one sentence and one table; every name is escaped."""
    head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
    body = "\n".join(_html_row(row) for row in report.rows)
    return (
        f"<h3>Gate: {'passed' if report.passed else 'failed'}</h3>\n"
        f"<p>{escape(report.reason)}. Held-out loss in nats per token.</p>\n"
        f"<table>\n<tr>{head}</tr>\n{body}\n</table>\n"
    )


def _html_row(row: GateRow) -> str:
    cells = (
        escape(row.suite),
        _number(row.before),
        _number(row.after),
        _number(row.change, sign="+"),
        _number(row.bound),
        "ok" if row.passed else "<strong>failed</strong>",
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4f}"

"""The README's table of claims, made from the stored results and from nothing else.

A value is ok or short only for the code that it was measured on; of any other it is stale. Commits of results and prose
are no other code (see `results.code_commit`), so a table that is written after measuring is still right in the commit
that brings it, and in a clone of that commit.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.registry import Figure
from benchmarks.results import ROOT, Result

README = ROOT / "README.md"
BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
_SIGNS = {"<=": "≤", ">=": "≥", "==": "="}


def number(result: Result | None) -> str:
    """Print a value, with its range when it has one."""
    if result is None:
        return "-"
    if result.low is None or result.high is None:
        return f"{result.value:.4g}"
    return f"{result.value:.4g} ({result.low:.4g} to {result.high:.4g})"


def bound(row: Figure) -> str:
    """Print a bound as people write it."""
    if row.bound is None:
        return "-"
    relation, limit = row.bound.split(" ")
    return f"{_SIGNS.get(relation, relation)} {limit}"


def table(figures: list[Figure], results: dict[str, Result], commit: str) -> str:
    """Make the Markdown table, judged for the code of `commit`."""
    lines = ["| claim | value | bound | | measured at | figure |", "|---|---|---|---|---|---|"]
    for row in figures:
        result = results.get(row.name)
        unit = "" if row.unit == "1" else f" {row.unit}"
        if result is None:
            value, holds, where = "not measured", "", "-"
        else:
            value, where = number(result) + unit, f"{result.commit}, {result.date}"
            holds = _judgement(row, result, commit)
        limit = bound(row) + (unit if row.bound else "")
        lines.append(f"| {row.claim} | {value} | {limit} | {holds} | {where} | `{row.name}` |")
    return "\n".join(lines)


def _judgement(row: Figure, result: Result, commit: str) -> str:
    if not result.speaks_for(commit):
        return "stale"
    if row.bound is None:
        return ""
    return "ok" if row.holds(result.value) else "**short**"


def write(figures: list[Figure], results: dict[str, Result], commit: str, readme: Path = README) -> int:
    """Put the table between the README's markers."""
    before, _, after = _split(readme.read_text())
    readme.write_text(f"{before}{BEGIN}\n{table(figures, results, commit)}\n{END}{after}")
    return 0


def check(figures: list[Figure], results: dict[str, Result], commit: str, readme: Path = README) -> int:
    """Return 1 and say the remedy when the README's table is not made from these results.

    A table whose judgements alone are of other code is out of date too, but no error: every commit of code makes it so
    until the figures are measured again, and a shallow clone cannot know. It is said, and the check goes on.
    """
    _, found, _ = _split(readme.read_text())
    expected = table(figures, results, commit)
    if found.strip() == expected:
        return 0
    if _without_judgements(found.strip()) == _without_judgements(expected):
        print("README.md: the table of claims speaks for other code: run make figures and --readme", file=sys.stderr)
        return 0
    print("README.md: the table of claims is out of date: run python -m benchmarks.figures --readme", file=sys.stderr)
    return 1


def _without_judgements(text: str) -> list[list[str]]:
    return [[cell for position, cell in enumerate(line.split(" | ")) if position != 3] for line in text.splitlines()]


def _split(text: str) -> tuple[str, str, str]:
    before, begin, rest = text.partition(BEGIN)
    found, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md must hold the markers {BEGIN} and {END}, one of them is missing: put it back")
    return before, found, after

"""Measure the project's claims anew and print the table: `python -m benchmarks.figures --class quick --only wheel`.

Verdicts: `ok` and `short` against the bound, `info` without one; `error` for a row that raised; `stale` for a stored
value of other code, whatever it says; `missing` for a row never measured. The table has all rows; the exit code is 1
when one of those just measured is short or in error.
`--readme` writes the README's table of claims from the stored results, `--check-readme` says whether it is up to date.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version

from benchmarks import claims
from benchmarks.registry import BUDGET_S, Figure, Reading, discover, figure, select
from benchmarks.results import Result, code_commit, load, store

__all__ = ["figure", "main"]

COLUMNS = ("name", "value", "unit", "bound", "verdict", "commit", "date")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    figures = discover()
    if options.readme or options.check_readme:
        action = claims.write if options.readme else claims.check
        return action(figures, load(), code_commit())
    chosen = select(figures, cls=options.cls, only=options.only)
    if not chosen:
        print(
            f"no figure of class {options.cls} starts with {options.only!r}: see benchmarks/rows_*.py", file=sys.stderr
        )
        return 2
    return _run(figures, chosen, budget_s=BUDGET_S[options.cls])


def verdict(row: Figure, result: Result | None, *, commit: str, measured_now: bool) -> str:
    """Judge a row: only a value of this very code can be ok or short."""
    if result is None:
        return "missing"
    if not measured_now and not result.speaks_for(commit):
        return "stale"
    if row.bound is None:
        return "info"
    return "ok" if row.holds(result.value) else "short"


def _run(figures: list[Figure], chosen: list[Figure], *, budget_s: float | None) -> int:
    commit, results, failed = code_commit(), load(), dict[str, str]()
    print(f"machine: {machine()}\n")
    began = time.monotonic()
    for number, row in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {row.name} ...", end=" ", flush=True)
        row_began = time.monotonic()
        try:
            results[row.name] = _measure(row, commit)
            store(results)
        except Exception as error:  # one row that cannot be measured must not hide the others
            failed[row.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{time.monotonic() - row_began:.1f} s {failed.get(row.name, '')}", flush=True)
    took_s = time.monotonic() - began
    names = {row.name for row in chosen}
    verdicts = {
        row.name: "error"
        if row.name in failed
        else verdict(row, results.get(row.name), commit=commit, measured_now=row.name in names)
        for row in figures
    }
    _print_table(figures, results, verdicts)
    bound = "" if budget_s is None else f" (bound {budget_s:.0f} s)"
    print(f"\n{len(chosen)} figures in {took_s:.0f} s{bound}, code {commit}")
    return int(bool({"short", "error"} & {verdicts[name] for name in names}))


def _measure(row: Figure, commit: str) -> Result:
    began = time.monotonic()
    taken = row.measure()
    reading = taken if isinstance(taken, Reading) else None
    return Result(
        value=float(reading.value if reading else taken),
        low=reading.low if reading else None,
        high=reading.high if reading else None,
        seconds=round(time.monotonic() - began, 1),
        commit=commit,
        date=datetime.now(timezone.utc).date().isoformat(),
        machine=machine(),
    )


def machine() -> str:
    """Describe what the numbers depend on, and nothing that names this machine."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {packages}"


def _print_table(figures: list[Figure], results: dict[str, Result], verdicts: dict[str, str]) -> None:
    lines = [COLUMNS]
    for row in figures:
        result = results.get(row.name) if verdicts[row.name] != "error" else None
        where = (result.commit, result.date) if result else ("-", "-")
        lines.append(
            (row.name, claims.number(result), row.unit, claims.bound(row), verdicts[row.name], *where)  # fmt: skip
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    print()
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description="Measure the project's claims.")
    parser.add_argument("--class", dest="cls", choices=list(BUDGET_S), default="quick", help="cost class to measure")
    parser.add_argument("--only", default="", metavar="PREFIX", help="only figures whose names start so")
    parser.add_argument("--readme", action="store_true", help="write the README's table of claims")
    parser.add_argument("--check-readme", action="store_true", help="fail if the README's table is out of date")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The measured values that are kept: `results.json`, one entry per figure, with the commit and the day of measurement.

A value speaks for the code it was measured on and for no other. The commit that counts is therefore the last one that
changed code: commits that only bring new results or prose do not make a value stale, anything else does, and so does a
working tree with uncommitted changes.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
CODE = [".", ":(exclude)benchmarks/results.json", ":(exclude)benchmarks/results/*", ":(exclude)*.md"]
DIRTY = "+changes"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One stored measurement."""

    value: float
    low: float | None
    high: float | None
    seconds: float
    commit: str
    date: str
    machine: str

    def speaks_for(self, commit: str) -> bool:
        """Say whether the value was measured on exactly this code."""
        return self.commit == commit and not commit.endswith(DIRTY)


def code_commit(root: Path = ROOT) -> str:
    """Name the commit that last changed code, marked when the working tree differs from it."""
    commit = _git(root, "log", "-1", "--format=%H", "--", *CODE)[:10] or "none"
    return commit + DIRTY if _git(root, "status", "--porcelain", "--", *CODE) else commit


def load(path: Path = RESULTS) -> dict[str, Result]:
    """Read the stored results; none is a valid state of a young repository."""
    if not path.exists():
        return {}
    return {name: Result(**entry) for name, entry in json.loads(path.read_text()).items()}


def store(results: dict[str, Result], path: Path = RESULTS) -> None:
    """Write all results at once, so that an interrupted run keeps the rows it has finished."""
    text = json.dumps({name: asdict(results[name]) for name in sorted(results)}, indent=1, ensure_ascii=False)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

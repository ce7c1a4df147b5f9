"""Run the workflows on Flyte 2, unmodified, and hold docs/flyte2.md to what does not carry over.

    make migrate-check        # makes .venv-migrate: flyte and flyte-migrate, the rest from the checkout's environment

`pyflyte-migrate run` runs them locally on a tiny federation, each in a process of its own, with a person's answer at
the gate; the second list is what it says that it ignores. Nothing here was run on a Flyte 2 cluster.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.federation import make_workspace

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/flyte2.md"
# What each prints last when it went as it should; the order is that of a first day.
WORKFLOWS = {
    "core_update": "n_accepted=1",
    "aggregate_experts": "CandidateRef(digest='',",
    "aggregate_experts_sharded": "CandidateRef(digest='',",
    "evaluate_suites": "SuiteLoss(suite='plays'",
    "evaluate_and_promote": "verdict='approved', version=1",
    "broadcast": "Published(version=1",
    "data_engine": "EngineReport(",
    "data_engine_regions": "EngineReport(",
    "nested_round": "verdict='approved', version=2",
}
ELASTIC = ("workflows/core_update_elastic.py", "core_update_2_cpu")


@dataclass(frozen=True, kw_only=True)
class Migration:
    """What came over."""

    passed: dict[str, bool]
    elastic_refused: bool
    ignored: frozenset[str]
    told: str


def migrate(program: Path) -> Migration:
    """Run every workflow with this `pyflyte-migrate`."""
    with tempfile.TemporaryDirectory() as scratch:
        config = make_workspace(Path(scratch) / "federation")
        told = {
            name: _run(program, "tests/flyte/flyte2.py", f"{name}_at", "--path", str(config), home=Path(scratch))
            for name in WORKFLOWS
        }
        plans = _run(program, "launchplans/schedules.py", "", home=Path(scratch))
        elastic = _run(program, *ELASTIC, "--config", str(config), home=Path(scratch))
    everything = " ".join([*told.values(), plans])
    lists = re.findall(r"args not supported by flyte-migrate and ignored: (\[[^\]]*\])", everything)
    ignored = frozenset(name for found in lists for name in ast.literal_eval(found))
    refused = "config type 'Ranks' is not supported" in elastic
    passed = {name: wanted.replace(" ", "") in told[name].replace(" ", "") for name, wanted in WORKFLOWS.items()}
    return Migration(passed=passed, elastic_refused=refused, ignored=ignored, told=everything)


def documented() -> frozenset[str]:
    """Return the arguments that docs/flyte2.md says are ignored."""
    (line,) = re.findall(r"<!-- ignored -->\n(.*)\n", PAGE.read_text())
    return frozenset(re.findall(r"`(\w+)`", line))


def _run(program: Path, *arguments: str, home: Path) -> str:
    done = subprocess.run(
        [program, "run", *arguments],
        cwd=ROOT,
        # Wide, for its boxes break lines; a home of its own, for it writes there.
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400", "HOME": str(home), "OMP_NUM_THREADS": "1"},
        input="approve\n",
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", done.stdout + done.stderr).split())


def main() -> None:
    """Print what came over, and fail when a workflow did not, or the page says otherwise."""
    found = migrate(Path(sys.argv[1]))
    for name, passed in found.passed.items():
        print(f"{'ok' if passed else 'FAILED':<8}{name}")
    print(f"{'refused' if found.elastic_refused else 'LOADS':<8}{ELASTIC[0]}")
    print(f"ignored: {', '.join(sorted(found.ignored))}")
    if found.ignored != documented():
        raise SystemExit(f"docs/flyte2.md says {', '.join(sorted(documented()))}: correct its line")
    if not found.elastic_refused or not all(found.passed.values()):
        raise SystemExit(found.told[-4000:])


if __name__ == "__main__":
    main()

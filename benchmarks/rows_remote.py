"""Every workflow remote, with the real `pyflyte` against a Flyte without a cluster: items 1 and 7 of issue 5.

One run of `make e2e`'s scenarios (`tests/e2e_flyte`) gives all rows; `docs/remote-proof.md` says what stands in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.measure import watch
from benchmarks.registry import Reading, figure
from benchmarks.results import ROOT

TIMEOUT_S = 1800


@dataclass(frozen=True, kw_only=True)
class Proof:
    """One run: scenario → seconds, those that did not pass, RPC → how often, and the wall time of all."""

    seconds: dict[str, float]
    failed: list[str]
    rpcs: dict[str, int]
    wall_s: float


@cache
def proof() -> Proof:
    """Run all scenarios once per process."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/e2e_flyte", f"--junitxml={report}"]
        process = subprocess.Popen(
            [*command, f"--basetemp={scratch}/t"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        cost = watch(process, TIMEOUT_S)
        tree = ElementTree.parse(report)
    cases = list(tree.iter("testcase"))
    found = {each.get("name"): json.loads(each.get("value")) for each in tree.iter("property")}
    done = Proof(
        seconds={case.get("name"): float(case.get("time")) for case in cases},
        failed=[case.get("name") for case in cases if {child.tag for child in case} & {"failure", "error", "skipped"}],
        rpcs=found["rpcs"],
        wall_s=cost.wall_s,
    )
    print(f"{done.wall_s:.0f} s: {json.dumps(done.seconds)} {json.dumps(done.rpcs)}", file=sys.stderr)
    return done


@figure("remote.scenarios", unit="%", bound="== 100", cls="full")
def remote_scenarios() -> float:
    """Scenarios with pyflyte run --remote that end as on Flyte: seven workflows, reject, time-out, kills, refusals."""
    return 100 * (1 - len(proof().failed) / len(proof().seconds))


@figure("remote.count", unit="1", bound=">= 14", cls="full")
def remote_count() -> float:
    """Scenarios of that run."""
    return len(proof().seconds)


@figure("remote.wall", unit="s", cls="full")
def remote_wall() -> Reading:
    """Wall time of one scenario, from a fresh federation to the execution's end, and the range over all of them."""
    return Reading.of(list(proof().seconds.values()))


@figure("remote.rpcs", unit="1", cls="full")
def remote_rpcs() -> float:
    """Different RPCs of FlyteAdmin that the scenarios use; docs/remote-proof.md lists them."""
    return len(proof().rpcs)


@figure("e2e.wall", unit="s", bound="<= 360", cls="full")
def e2e_wall() -> float:
    """Wall time of make e2e, all scenarios one after another."""
    return proof().wall_s

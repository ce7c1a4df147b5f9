"""The test suite as a source of figures: one run, measured, and counted by what its tests guard."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.measure import Cost, watch
from benchmarks.registry import figure
from benchmarks.results import ROOT

TIMEOUT_S = 1800


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One run of all tests: (module, test, outcome) each, wall time and peak memory of the whole process tree."""

    cases: tuple[tuple[str, str, str], ...]
    cost: Cost

    def share_passed(self, *parts: str) -> float:
        """Percentage of the tests whose `module::test` contains one of `parts` that passed; skipped ones did not."""
        chosen = [outcome for module, test, outcome in self.cases if any(part in f"{module}::{test}" for part in parts)]
        if not chosen:
            raise RuntimeError(f"no test matches {parts}")
        return 100 * sum(outcome == "passed" for outcome in chosen) / len(chosen)


@cache
def suite() -> Suite:
    """Run the whole suite once per process, as `make test` does."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "junit.xml"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", f"--junitxml={report}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        cost = watch(process, TIMEOUT_S)
        cases = tuple(_case(node) for node in ElementTree.parse(report).iter("testcase"))
    return Suite(cases=cases, cost=cost)


def _case(node: ElementTree.Element) -> tuple[str, str, str]:
    tags = {child.tag for child in node}
    outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
    return node.get("classname", ""), node.get("name", ""), outcome


@figure("tests.wall", unit="s", bound="<= 600", cls="full")
def tests_wall() -> float:
    """Wall time of the whole test suite after set-up."""
    return suite().cost.wall_s


@figure("tests.memory", unit="GiB", bound="<= 6", cls="full")
def tests_memory() -> float:
    """Peak memory of the test suite with all the servers and devices it starts."""
    return suite().cost.peak_gib


@figure("tests.failed", unit="1", bound="== 0", cls="full")
def tests_failed() -> float:
    """Tests that failed."""
    return sum(outcome == "failed" for _, _, outcome in suite().cases)


@figure("tests.passed", unit="1", cls="full")
def tests_passed() -> float:
    """Tests that passed."""
    return sum(outcome == "passed" for _, _, outcome in suite().cases)


@figure("workflows.alone", unit="%", bound="== 100", cls="full")
def workflows_alone() -> float:
    """Scenarios of the five workflows that end as they should: alone with pyflyte, approve, reject, gate failing."""
    return suite().share_passed("tests.flyte.test_workflows", "tests.tier1.loops.test_loops")


@figure("kills.survived", unit="%", bound="== 100", cls="full")
def kills_survived() -> float:
    """Kills at named failpoints and random times after which weights are equal and each sequence is in exactly once."""
    return suite().share_passed("test_kills", "test_a_kill_anywhere", "sigkill", "killed")


@figure("corruption.named", unit="%", bound="== 100", cls="full")
def corruption_named() -> float:
    """One-byte changes and replacements in blob, record, payload, envelope and manifest that are detected and named."""
    return suite().share_passed("versions.test_replay", "versions.test_chain", "test_a_corrupt_blob")


@figure("promotion.blocked", unit="%", bound="== 100", cls="full")
def promotion_blocked() -> float:
    """Promotions without policy, second person, signature, lineage or evaluation that are blocked, with a line each."""
    return suite().share_passed("governance.test_promotion")


@figure("bad_input.one_line", unit="%", bound="== 100", cls="full")
def bad_input_one_line() -> float:
    """Kinds of bad input that end in one line with value, bound and remedy, or in quarantine with the reason."""
    return suite().share_passed("e2e.test_bad_input")


@figure("checks.can_fail", unit="%", bound="== 100", cls="full")
def checks_can_fail() -> float:
    """Violations planted in a copy that turn `make check` red."""
    return suite().share_passed("house.test_checks")

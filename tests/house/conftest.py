"""The wheel, built once; and the memory the tests took, printed above pytest's closing line."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from benchmarks.wheel import build_wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the wheel built from a clean copy of this checkout."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the run needed: the largest process of its own and the largest one it started."""
    # Linux counts ru_maxrss in KiB.
    own, child = (resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    terminalreporter.write_line(f"peak memory: {own:.2f} GiB here, {child:.2f} GiB in the largest process started")

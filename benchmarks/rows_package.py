"""What a platform engineer's machine does, and has, before Flyte knows the project: items 2, 5 and 6 of issue 5."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.registry import Reading, figure
from tests.flyte.packaged import SNAPSHOT, package, read, snapshot

REPEATS = 5


@figure("package.wall", unit="s", bound="<= 10", cls="full")
def package_wall() -> Reading:
    """Time of `pyflyte package` of all workflows and launch plans, offline, equal to the committed snapshot."""
    with tempfile.TemporaryDirectory() as scratch:
        return Reading.of([_package(Path(scratch) / "package.tgz") for _ in range(REPEATS)])


def _package(archive: Path) -> float:
    began = time.perf_counter()
    package(archive)
    took_s = time.perf_counter() - began
    if snapshot(read(archive)) != SNAPSHOT.read_text():
        raise RuntimeError("the package is not the committed one: run the tests of tests/flyte/test_package.py")
    return took_s

"""What a platform engineer's machine does, and has, before Flyte knows the project: items 2, 5 and 6 of issue 5."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.registry import Reading, figure
from benchmarks.results import ROOT
from tests.flyte.absent import BLOCKER
from tests.flyte.migrate import documented, migrate
from tests.flyte.packaged import PYFLYTE, SNAPSHOT, package, read, snapshot

REPEATS = 5
# What a GPU host has and a registering host needs not; `torch` itself is the CPU build here.
GPU_ONLY = ("deepspeed", "triton", "nvidia", "cuda", "pynvml", "flash_attn")
PACKAGE = "from flytekit.clis.sdk_in_container.pyflyte import main; main()"


@figure("package.wall", unit="s", bound="<= 10", cls="full")
def package_wall() -> Reading:
    """Time of `pyflyte package` of all workflows and launch plans, offline, equal to the committed snapshot."""
    with tempfile.TemporaryDirectory() as scratch:
        return Reading.of([_package(Path(scratch) / "package.tgz") for _ in range(REPEATS)])


@figure("migrate.workflows", unit="1", bound="== 9", cls="long")
def migrate_workflows() -> float:
    """Workflows, of nine, that pyflyte-migrate runs on Flyte 2 in a local run, with what it ignores as documented."""
    program = ROOT / ".venv-migrate/bin/pyflyte-migrate"
    if not program.exists():
        raise RuntimeError(".venv-migrate is missing: run make migrate-check once, it needs a package index")
    found = migrate(program)
    if found.ignored != documented() or not found.elastic_refused:
        raise RuntimeError(f"docs/flyte2.md does not fit: ignored are {', '.join(sorted(found.ignored))}")
    return sum(found.passed.values())


@figure("package.cpu_only", unit="1", bound=">= 40", cls="full")
def package_cpu_only() -> float:
    """Tasks, workflows and plans packaged with a CPU torch, where CUDA packages and deepspeed cannot be imported."""
    if torch.version.cuda is not None:
        raise RuntimeError(f"torch {torch.__version__} is a CUDA build: measure in an environment with the CPU build")
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "package.tgz"
        _package(archive, program=(sys.executable, "-c", BLOCKER.format(absent=GPU_ONLY) + PACKAGE))
        return len(read(archive))


def _package(archive: Path, program: tuple[str, ...] = PYFLYTE) -> float:
    began = time.perf_counter()
    package(archive, program=program)
    took_s = time.perf_counter() - began
    if snapshot(read(archive)) != SNAPSHOT.read_text():
        raise RuntimeError("the package is not the committed one: run the tests of tests/flyte/test_package.py")
    return took_s

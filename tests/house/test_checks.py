"""`make check` can fail: each of its checks goes red on a planted violation, in a copy of the checkout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.wheel import copy_clean

LAZY = "from __future__ import annotations\n\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout that git knows, so that the wheel of the copy can be built."""
    copy = copy_clean(tmp_path_factory.mktemp("planted") / "checkout")
    subprocess.run(["git", "init", "-q", copy], check=True)
    # Whoever has measured since the last commit has new results, and in the copy they are in the table too.
    subprocess.run([sys.executable, "-m", "benchmarks.figures", "--readme"], cwd=copy, check=True)
    return copy


def _make(checkout: Path, target: str) -> subprocess.CompletedProcess[str]:
    # This environment serves the copy; an empty STAMP says that it is ready, although a planted pyproject.toml differs.
    command = ["make", "-C", str(checkout), target, f"VENV={sys.prefix}", "STAMP="]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _append(text: str) -> Callable[[str], str]:
    return lambda found: found + text


def _replace(old: str, new: str) -> Callable[[str], str]:
    def edit(found: str) -> str:
        assert old in found, f"nothing to plant: {old!r} is gone"
        return found.replace(old, new)

    return edit


PLANTED = {
    "an unused import": ("lint", "tier1/planted.py", _append('"""Planted."""\n\n' + LAZY + "import json\n"), "F401"),
    "a missing public docstring": ("lint", "tier1/planted.py", _append(LAZY + "def loose():\n    return 1\n"), "D103"),
    "eager annotations": ("lint", "tier1/planted.py", _append('"""Planted."""\n\nVALUE = 1\n'), "I002"),
    "torch at the door of a device": ("lint", "fednested_lib/errors.py", _append("import torch\n"), "TID253"),
    "mlflow at tier 1's door": ("lint", "tier1/config.py", _append("import mlflow\n"), "TID253"),
    "a pickle": ("lint", "tier1/config.py", _append("import pickle\n"), "TID251"),
    "a relative import": ("lint", "tier1/config.py", _append("from . import config\n"), "TID252"),
    "a print in the library": ("lint", "fednested_lib/errors.py", _append("print(1)\n"), "T201"),
    "crooked format": (
        "lint",
        "tier1/planted.py",
        _append('"""Planted."""\n\n' + LAZY + "VALUE = { 1 : 2 }\n"),
        "would be reformatted",
    ),
    "tier1 importing tasks": ("imports", "tier1/config.py", _append("import tasks\n"), "Imports point one way"),
    "images importing tier1": ("imports", "images/__init__.py", _append("import tier1\n"), "Imports point one way"),
    "the library importing tier1": ("imports", "fednested_lib/errors.py", _append("import tier1\n"), "one way"),
    "services importing workflows": ("imports", "services/planted.py", _append("import workflows\n"), "Services stand"),
    "tier1 importing services": ("imports", "tier1/config.py", _append("import services\n"), "Nothing stands"),
    "tier1 importing flytekit": ("imports", "tier1/config.py", _append("import flytekit\n"), "plain Python"),
    "a service importing flytekit": ("imports", "services/planted.py", _append("import flytekit\n"), "plain Python"),
    "flytekit in the trigger outside its launcher": (
        "imports",
        "services/trigger/service.py",
        _append("import flytekit\n"),
        "plain Python",
    ),
    "the trigger's launcher without its exception": (
        "imports",
        "pyproject.toml",
        _replace('"services.trigger.remote -> flytekit", ', ""),
        "plain Python",
    ),
    "the library importing mlflow": (
        "imports",
        "fednested_lib/errors.py",
        _append("import mlflow\n"),
        "device installs",
    ),
    "tier1 importing its benchmarks": ("imports", "tier1/config.py", _append("import benchmarks\n"), "No room imports"),
    "a claim edited by hand": ("claims", "README.md", _replace("| claim |", "| boast |"), "out of date"),
    "a figure nobody put into the README": (
        "claims",
        "benchmarks/rows_planted.py",
        _append(
            "from benchmarks.registry import figure\n\n\n@figure('planted', unit='1')\n"
            "def planted() -> float:\n    '''Planted.'''\n    return 1.0\n"
        ),
        "out of date",
    ),
    "tier1 in the wheel": (
        "wheel-test",
        "pyproject.toml",
        _replace('include = ["fednested_lib*"]', 'include = ["fednested_lib*", "tier1*"]'),
        "test_contains_the_library_alone",
    ),
    "a dependency nobody asked for": (
        "wheel-test",
        "fednested_lib/errors.py",
        _append("def _late():\n    import pandas\n"),
        "test_wheel_asks_for_exactly_what_the_library_imports",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("violation", PLANTED)
def test_check_sees(violation: str, checkout: Path) -> None:
    """The check that guards a rule fails on this violation and names it."""
    target, name, plant, said = PLANTED[violation]
    path = checkout / name
    before = path.read_text() if path.exists() else None
    path.write_text(plant(before or ""))
    try:
        done = _make(checkout, target)
    finally:
        path.unlink() if before is None else path.write_text(before)
    assert done.returncode != 0, f"{violation} passed `make {target}`"
    assert said in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("target", ["lint", "imports", "claims"])
def test_check_passes_unplanted(target: str, checkout: Path) -> None:
    """Without a violation the same checks are green, so it was the violation that they saw."""
    done = _make(checkout, target)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]

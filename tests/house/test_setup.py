"""`make setup` on the wrong Python is one line with the value, the bound and the remedy."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from benchmarks.results import ROOT


def _interpreter(tmp_path: Path, version: str) -> Path:
    """A launcher that answers like a Python of another version."""
    major, minor, patch = version.split(".")
    launcher = tmp_path / "python-other"
    # The real interpreter answers, with its version number replaced before the question is run.
    launcher.write_text(
        "#!/bin/sh\n"
        f"exec python3 -c \"import sys; sys.version_info = ({major}, {minor}, {patch}, 'final', 0); exec('''$2''')\"\n"
    )
    launcher.chmod(0o755)
    return launcher


def _make_venv(target: Path, python: Path | str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / ".ci" / "make_venv"), str(target)]
    return subprocess.run(
        command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True, check=False
    )


def test_a_newer_python_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Python 3.13 is named, with the bound and what to install, and no environment is left behind."""
    done = _make_venv(tmp_path / "venv", _interpreter(tmp_path, "3.13.0"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Python must be 3.10 to 3.12, got 3.13.0" in done.stderr
    assert "make setup PYTHON=python3.11" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_missing_python_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """An interpreter that does not exist is named as such, in one line."""
    done = _make_venv(tmp_path / "venv", "python-that-is-not-here")
    assert done.returncode == 2
    assert "got none (python-that-is-not-here)" in done.stderr


def test_half_an_environment_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    """When the environment cannot be made, the next `make setup` starts over."""
    blocked = tmp_path / "venv"
    blocked.write_text("a file where the environment should go")
    done = _make_venv(blocked, "python3.11" if os.access("/usr/bin/python3.11", os.X_OK) else "python3")
    assert done.returncode == 1
    assert not (blocked / "bin" / "python").exists()

"""Run a program where modules that are installed cannot be imported: what an image or a machine without them sees."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from flytekit import ImageSpec

ROOT = Path(__file__).resolve().parents[2]
BLOCKER = """
import sys
from importlib.machinery import PathFinder
ABSENT = set({absent!r})
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run_without(modules: tuple[str, ...], program: str) -> str:
    """Run a program in a process where none of these top-level modules can be found, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER.format(absent=modules) + program],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def lacking(image: ImageSpec) -> tuple[str, ...]:
    """Return the modules that are installed here and in no package of an image."""
    present = {line.split("==")[0].replace("-", "_") for line in image.packages}
    # The checkout itself is shipped; flytekit asks for every plug-in that is installed, this one no task uses.
    present |= {"fednested_lib", "flytekitplugins_deck_standard"}
    owners = packages_distributions().items()
    return tuple(name for name, found in owners if not {_normal(each) for each in found} & present)


def _normal(name: str) -> str:
    return name.replace("-", "_").replace(".", "_").lower()

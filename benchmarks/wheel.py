"""Build the edge wheel as a release would: from a clean copy of the repository, never from a working directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.results import ROOT


def copy_clean(target: Path, root: Path = ROOT) -> Path:
    """Copy what git knows or would add, so that no build directory or ignored file can reach the copy."""
    listing = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    return target


def build_wheel(target: Path, root: Path = ROOT) -> Path:
    """Build the wheel of a clean copy under `target` and return its path."""
    source = copy_clean(target / "source", root)
    # No isolation: the build back end is pinned in the environment, and nothing is downloaded.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the wheel does not build: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    (wheel,) = target.glob("*.whl")
    return wheel

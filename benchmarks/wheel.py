"""The edge wheel as a release would build it, from a clean copy of the repository, and a device that installed it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
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


def install_device(wheel: Path, venv: Path) -> Path:
    """Make an environment with the wheel and third-party packages and nothing of this checkout; return its `bin`.

    Links to this environment's packages stand for an installation of several minutes; fednested's own editable installs
    stay behind.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    packages = venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for source in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "fednested" not in source.name and source.name != "__pycache__" and source.suffix != ".pth":
            (packages / source.name).symlink_to(source)
    command = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, wheel], check=True, env=device_environment())
    return venv / "bin"


def device_environment(**extra: str) -> dict[str, str]:
    """Return this environment without what would lead back to the checkout."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}

"""What a device pays before it trains: the wheel, what it pulls in, and the time to start."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

from benchmarks.registry import Reading, figure
from benchmarks.results import ROOT
from benchmarks.wheel import build_wheel

REPEATS = 5
# The two modules that compute; everything else a device runs must not wait for torch.
HEAVY = {"adapters", "frozen", "router_bias", "training"}  # the modules that compute; see pyproject.toml


@figure("wheel.size", unit="kB", bound="<= 200")
def wheel_size() -> float:
    """Size of the wheel that a device installs."""
    with tempfile.TemporaryDirectory() as scratch:
        return build_wheel(Path(scratch)).stat().st_size / 1000


@figure("wheel.dependencies", unit="1", bound="<= 13")
def wheel_dependencies() -> float:
    """Packages that the wheel asks for, extras aside."""
    with tempfile.TemporaryDirectory() as scratch, ZipFile(build_wheel(Path(scratch))) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        required = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    return len([line for line in required if "extra ==" not in line])


@figure("import.time", unit="ms", bound="<= 300")
def import_time() -> Reading:
    """Time to `import fednested_lib` in a fresh process, median of 5."""
    code = "import time; t = time.perf_counter(); import fednested_lib; print(time.perf_counter() - t)"
    return Reading.of([1000 * float(_python(code)) for _ in range(REPEATS)])


@figure("import.contract", unit="ms", bound="<= 1000")
def import_contract() -> Reading:
    """CPU time to import every module of the library but the three that compute, in a fresh process, median of 5."""
    code = f"import time; t = time.process_time(); {_import_contract()}; print(time.process_time() - t)"
    return Reading.of([1000 * float(_python(code)) for _ in range(REPEATS)])


@figure("import.torch", unit="1", bound="== 0")
def import_torch() -> float:
    """Modules of torch or transformers that importing them loads."""
    heavy = "sum(m.split('.')[0] in ('torch', 'transformers') for m in sys.modules)"
    return float(_python(f"import sys; {_import_contract()}; print({heavy})"))


@figure("cli.help", unit="ms", bound="<= 1500")
def cli_help() -> Reading:
    """Time of `fednested --help`, the whole process, median of 5."""
    repeats = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        _python("import sys; sys.argv = ['fednested', '--help']; from fednested_lib.cli import main; main()")
        repeats.append(1000 * (time.perf_counter() - began))
    return Reading.of(repeats)


def _import_contract() -> str:
    modules = sorted(path.stem for path in (ROOT / "fednested_lib").glob("*.py") if path.stem not in HEAVY)
    names = ", ".join(f"fednested_lib.{name}" for name in modules if name != "__init__")
    return f"import fednested_lib, {names}"


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout

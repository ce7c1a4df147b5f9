"""An environment of its own for each peer: made once, outside this checkout's environment, from the package index.

`FEDNESTED_PEERS` names the directory; `.venv-peers/` in the checkout (git-ignored) by default. flwr 1.42.0 asks for a
certifi of one day; indexes that mirror late do not have it, so certifi, which plays no part on loopback, is taken in
any version and everything else as flwr pins it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.results import ROOT

PINS = {"flwr": "1.42.0", "nvflare": "2.9.0"}
TIMEOUT_S = 600
_REQUIREMENTS = """
from importlib.metadata import requires
for line in requires("{peer}") or []:
    if "extra ==" not in line:
        print("certifi" if line.startswith("certifi") else line)
"""


class PeerMissing(RuntimeError):
    """A peer's environment cannot be made; the message is one line with the remedy."""


def interpreter(peer: str) -> Path:
    """Return the Python of a peer's environment; make it if it is not there.

    Raises:
        PeerMissing: the package index cannot be reached or does not have the peer.
    """
    home = Path(os.environ.get("FEDNESTED_PEERS") or ROOT / ".venv-peers") / f"{peer}-{PINS[peer]}"
    python, ready = home / "bin" / "python", home / "ready"
    if not ready.exists():
        _run(peer, [sys.executable, "-m", "venv", "--clear", str(home)])
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        _run(peer, [*pip, "--no-deps", f"{peer}=={PINS[peer]}"])
        wanted = _run(peer, [str(python), "-c", _REQUIREMENTS.format(peer=peer)]).split("\n")
        _run(peer, [*pip, *filter(None, wanted)])
        ready.touch()
    return python


def _run(peer: str, command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        reason = f"not done after {TIMEOUT_S} s"
    else:
        if done.returncode == 0:
            return done.stdout
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
    raise PeerMissing(
        f"{peer} {PINS[peer]} cannot be installed ({reason[:160]}): connect the package index, or set FEDNESTED_PEERS "
        "to a directory where it is"
    )

"""What the second process of a device costs: the resident memory of a sidecar at work."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.device_world import ProcessFederation
from benchmarks.registry import figure
from fednested_lib.config import load_tier2
from fednested_lib.supervisor import MEMORY
from fednested_lib.trainer_loop import TrainerLoop
from services.embedded import EmbeddedBroker

PATIENCE_S = 120.0


@figure("sidecar.memory", unit="MB", bound="<= 60", cls="full")
def sidecar_memory() -> float:
    """Resident memory of a sidecar process on a real broker, after it has released and sent three updates."""
    with tempfile.TemporaryDirectory() as directory, EmbeddedBroker(Path(directory) / "broker") as broker:
        place = Path(directory) / "federation"
        place.mkdir()
        world = ProcessFederation(place, broker.bootstrap, n_devices=1, training={"updates_per_base": 1000})
        (path,) = world.devices
        command = [sys.executable, "-m", "fednested_lib.cli", "tier2", "sidecar", "--config", str(path)]
        environment = os.environ | MEMORY["sidecar"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        try:
            return _after_updates(process, path, n=3)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
            world.close()


def _after_updates(process: subprocess.Popen, path: Path, n: int) -> float:
    """Let this process be the trainer until the sidecar has taken n updates; return its resident memory in MB."""
    trainer = TrainerLoop(load_tier2(path), lambda: False)
    deadline = time.monotonic() + PATIENCE_S
    while trainer.state.next_sequence < n:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the sidecar took {trainer.state.next_sequence} of {n} updates, exit {process.poll()}")
        if not trainer.turn():
            time.sleep(0.05)
    mapped = Path(f"/proc/{process.pid}/maps").read_text()
    for library in ("torch", "numpy"):
        if library in mapped:
            raise RuntimeError(f"the sidecar has loaded {library}")
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

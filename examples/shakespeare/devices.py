"""Devices of the demo: real processes of the `fednested` command, each with its own text, key and directory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from examples.shakespeare.settings import DemoSettings
from fednested_lib.errors import FednestedError
from fednested_lib.policy import write_policy
from fednested_lib.signing import Signer

_GUARD = Path(__file__).resolve().parents[2] / "services" / "process_guard.py"


def make_keys(directory: Path, clients: list[str]) -> dict[str, str]:
    """Make one key per device and return client id → public key, which tier 1 registers."""
    keys = {}
    for client in clients:
        signer = Signer.generate()
        signer.save(directory / client / "device.key")
        keys[client] = signer.public_key
    return keys


def write_config(
    directory: Path,
    client: str,
    *,
    data: Path,
    heldout: Path,
    home: Path,
    bootstrap: str,
    federation: str,
    control_key: str,
    pace_s: float,
    settings: DemoSettings,
) -> Path:
    """Write the tier2.yaml of one device."""
    document = {
        "federation": federation,
        "client_id": client,
        "key": "device.key",
        "home": "home",
        "data": str(data),
        "heldout": str(heldout),
        "blobs_uri": str(home / "blobs"),
        "payloads_uri": str(home / "payloads"),
        "log": {"bootstrap": bootstrap},
        "control": {"public_key": control_key, "poll_s": 0.3},
        "adapters": {"rank": settings.rank, "alpha": settings.alpha},
        "training": {
            "steps": settings.local_steps,
            "batch_size": settings.local_batch,
            "seq_len": settings.seq_len,
            "learning_rate": settings.local_rate,
            "seed": settings.seed,
            "pace_s": pace_s,
        },
    }
    adapter = {"mode": "lora", "rank": settings.rank, "alpha": float(settings.alpha)}
    site = Signer.generate()  # in a real federation whoever answers for the device's data keeps it
    policy = write_policy(directory / client / "policy.yaml", site, federation=federation, adapters=[adapter])
    document["policy"] = {"file": "policy.yaml", "public_key": policy.public_key}
    path = directory / client / "tier2.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


class Fleet:
    """The device processes; none outlives this process, however it ends."""

    def __init__(self, configs: dict[str, Path]):
        self._configs = configs
        self.processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Fleet:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        guard = [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), "10"]
        device = [sys.executable, "-m", "fednested_lib.cli", "tier2", "run-client"]
        for client, config in self._configs.items():
            with open(config.parent / "device.log", "wb") as log:
                self.processes[client] = subprocess.Popen(
                    [*guard, *device, "--config", str(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def check(self) -> None:
        """Raise if a device ended by itself with an error.

        Raises:
            FednestedError: which one, and the end of its log.
        """
        for client, process in self.processes.items():
            if process.poll() not in (None, 0):
                log = (self._configs[client].parent / "device.log").read_text(errors="replace")
                tail = log.strip().splitlines()[-1:]
                raise FednestedError(
                    f"device {client} ended with code {process.returncode}: {' '.join(tail) or 'no output'}"
                )

    def wait(self, timeout_s: float) -> None:
        """Wait until every device has stopped by itself."""
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in self.processes.values()) and time.monotonic() < deadline:
            time.sleep(0.1)

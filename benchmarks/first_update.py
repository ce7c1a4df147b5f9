"""A newcomer's device: an empty directory, the wheel, three commands, and the first update that tier 1 accepts.

Tier 1 stands already, on a real broker: it has a champion and folds what arrives. The device has its text and nothing
else. What is not counted: installing packages, and a person's time to register the device's key and to fill in where
tier 1 is.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

import yaml

from benchmarks.device_world import ProcessFederation
from benchmarks.results import ROOT
from benchmarks.small_federation import SEQ_LEN
from benchmarks.wheel import build_wheel, device_environment, install_device
from fednested_lib.log import UPDATES
from services.embedded import EmbeddedBroker

NEWCOMERS = 5
PATIENCE_S = 120.0
LOOK_S = 0.02


@dataclass(frozen=True, kw_only=True)
class FirstUpdate:
    """What one newcomer's way took.

    Args:
        commands: from the empty directory to an accepted update, in order.
        seconds: that they ran until tier 1 had folded the update.
        cold_start_s: from the start of `run-client` to the end of the first training step.
    """

    commands: tuple[str, ...]
    seconds: float
    cold_start_s: float


@cache
def first_updates() -> list[FirstUpdate]:
    """Go the newcomer's way five times, each with a device that tier 1 has never heard of.

    Raises:
        RuntimeError: a command failed, or no update was accepted in time.
    """
    with tempfile.TemporaryDirectory() as scratch, EmbeddedBroker(Path(scratch) / "broker") as broker:
        root = Path(scratch)
        commands = install_device(build_wheel(root / "wheel"), root / "venv")
        world = ProcessFederation(root / "tier1", broker.bootstrap, n_devices=1, training={})
        try:
            return [
                _go(commands / "fednested", root / f"device-{n}", world, broker.bootstrap) for n in range(NEWCOMERS)
            ]
        finally:
            world.close()


def _go(fednested: Path, device: Path, world: ProcessFederation, bootstrap: str) -> FirstUpdate:
    device.mkdir()
    said, first_s = _run(fednested, "init-config", "tier2", "--client-id", device.name, cwd=device)
    _register(world, device.name, re.search(r"public key ([0-9a-f]{64})", said)[1])
    _fill_in(device, world, bootstrap)
    _, second_s = _run(fednested, "tier2", "doctor", "--config", "tier2.yaml", cwd=device)
    began, began_at = time.monotonic(), time.time()
    with _running(fednested, device) as process:
        _until_sent(world, process, device)
        world.fold()
        third_s = time.monotonic() - began
    accepted = [each.client_id for each in world.tier1.chain.state().champion.accepted]
    if accepted != [device.name]:
        raise RuntimeError(f"the new champion holds updates of {accepted}, must be of {device.name}")
    return FirstUpdate(
        commands=("init-config tier2", "tier2 doctor", "tier2 run-client"),
        seconds=first_s + second_s + third_s,
        cold_start_s=_time_of("trainer.first_step", device) - began_at,
    )


def _run(fednested: Path, *arguments: str, cwd: Path) -> tuple[str, float]:
    began = time.monotonic()
    done = subprocess.run(
        [fednested, *arguments], cwd=cwd, env=device_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout, time.monotonic() - began


def _register(world: ProcessFederation, client: str, public_key: str) -> None:
    path = world.directory / "tier1.yaml"
    document = yaml.safe_load(path.read_text())
    document["devices"] = {client: {"public_key": public_key}}
    path.write_text(yaml.safe_dump(document))
    world.reopen()


def _fill_in(device: Path, world: ProcessFederation, bootstrap: str) -> None:
    """Put a text where the example says, and what the device cannot know into it: where tier 1 is, and its key."""
    rows = (json.dumps({"text": line}) for line in (ROOT / "LICENSE").read_text().splitlines() if line.strip())
    (device / "text.jsonl").write_text("\n".join(rows) + "\n")
    path = device / "tier2.yaml"
    document = yaml.safe_load(path.read_text())
    document["log"]["bootstrap"] = bootstrap
    document["control"]["public_key"] = world.tier1.signer.public_key
    document |= {"blobs_uri": str(world.tier1.home / "blobs"), "payloads_uri": str(world.tier1.home / "payloads")}
    document["training"]["seq_len"] = SEQ_LEN
    path.write_text(yaml.safe_dump(document))


@contextmanager
def _running(fednested: Path, device: Path) -> Iterator[subprocess.Popen]:
    command = [fednested, "tier2", "run-client", "--config", "tier2.yaml"]
    with open(device / "events.jsonl", "wb") as events:
        process = subprocess.Popen(
            command, cwd=device, env=device_environment(), stdout=subprocess.DEVNULL, stderr=events
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=PATIENCE_S)


def _until_sent(world: ProcessFederation, process: subprocess.Popen, device: Path) -> None:
    offsets = world.tier1.chain.state().offsets
    deadline = time.monotonic() + PATIENCE_S
    while sum(high for _, high in world.tier1.log.watermarks(UPDATES).values()) <= sum(offsets.values()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no update within {PATIENCE_S} s: {(device / 'events.jsonl').read_text()[-2000:]}")
        time.sleep(LOOK_S)


def _time_of(event: str, device: Path) -> float:
    """Return when an event was first logged, in seconds since the epoch."""
    lines = map(json.loads, (device / "events.jsonl").read_text().splitlines())
    return datetime.fromisoformat(next(line["timestamp"] for line in lines if line["event"] == event)).timestamp()

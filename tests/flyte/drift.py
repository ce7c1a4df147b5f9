"""From telemetry with a planted drift to a candidate, with nobody at a keyboard: on a real broker, in real processes.

Real: the broker, devices' signatures, the data engine's workflow under `pyflyte run`, the trigger's command and its
gRPC, the round that is launched, its training and its candidate. Played here: the hourly schedule; FlyteAdmin, which
admits an execution and runs the launch plan's workflow under `pyflyte run`; the person, who is not there.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fednested_lib.events import TrainingTelemetry, parse_event, sign_event
from fednested_lib.log import TASKS, TELEMETRY
from tests.federation import device_key, make_workspace
from tests.flyte.admin_stand_in import AdminStandIn
from tier1.federation import Federation, open_federation
from tier1.loops.evaluate_and_promote import waiting_versions

ROOT = Path(__file__).resolve().parents[2]
REGIONS = {"north": ("n0", "n1", "n2"), "south": ("s0", "s1", "s2")}
WINDOW_S = 4.0
PATIENCE_S = 180.0
GRACE_S = 20.0  # for a trigger that was asked to end


@dataclass(frozen=True, kw_only=True)
class DriftRun:
    """What one planted drift led to.

    Args:
        seconds: from the first record with a higher loss until a candidate, gated automatically, waits for a person.
        tasks: on `tasks.training`, of this federation: findings' subjects.
        admitted: names of executions, in the order of their admission.
        candidates: files that the loops wrote.
        waiting: versions that wait for a person.
    """

    seconds: float
    tasks: list[str]
    admitted: list[str]
    candidates: int
    waiting: int


class RunningAdmin(AdminStandIn):
    """A stand-in that runs what it admits: the nightly plan, a round with a core update; its gate finds nobody."""

    def __init__(self, config: Path):
        super().__init__()
        self._config = config
        self.runs: list[subprocess.Popen] = []

    def _admit(self, request) -> None:
        super()._admit(request)
        assert request.spec.launch_plan.name == "nested_round_nightly", request.spec.launch_plan.name
        self.runs.append(_pyflyte(self._config, "nested_round", "--core", stdin=subprocess.PIPE))

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for run in self.runs:
            run.kill()
            run.wait()


def drift_to_candidate(directory: Path, bootstrap: str, *, seed: int) -> DriftRun:
    """Let devices tell a steady loss, then one region a higher one, and wait for the candidate and one more turn."""
    config, rng = _workspace(directory, bootstrap), random.Random(seed)
    fed = open_federation(config)
    with RunningAdmin(config) as admin, _trigger(config, admin), contextlib.closing(fed):
        _tell(fed, rng, sequence=0, north=3.0)
        _turn(config)
        time.sleep(WINDOW_S)  # what was told becomes the reference
        planted = time.monotonic()
        _tell(fed, rng, sequence=1, north=3.6)
        _turn(config)
        while not waiting_versions(fed):
            _alive(admin, planted)
            time.sleep(0.1)
        seconds = time.monotonic() - planted
        _tell(fed, rng, sequence=2, north=3.6)
        _turn(config)  # the finding is still open
        time.sleep(1.0)  # five looks of the trigger
        records = fed.log.read(TASKS, fed.log.watermarks(TASKS))
        tasks = [task for task in (parse_event(each.value) for each in records) if task.federation == _name(fed)]
        return DriftRun(
            seconds=seconds,
            tasks=[task.reason.subject for task in tasks],
            admitted=list(admin.admitted),
            candidates=sum(path.is_file() for path in (fed.home / "candidates").iterdir()),
            waiting=len(waiting_versions(fed)),
        )


def _name(fed: Federation) -> str:
    return fed.config.federation


def _workspace(directory: Path, bootstrap: str) -> Path:
    devices = {
        client: {"public_key": device_key(client).public_key, "region": region}
        for region, clients in REGIONS.items()
        for client in clients
    }
    engine = {"window_s": WINDOW_S, "reference_s": 3600.0, "min_devices": 3}
    config = make_workspace(directory, clients=(), bootstrap=bootstrap, devices=devices, data_engine=engine)
    name = f"drift-{uuid.uuid4().hex[:12]}"  # other runs share the broker
    config.write_text(config.read_text().replace("federation: fednested\n", f"federation: {name}\n"))
    return config


def _tell(fed: Federation, rng: random.Random, *, sequence: int, north: float) -> None:
    for region, clients in REGIONS.items():
        for client in clients:
            loss = rng.gauss(north if region == "north" else 3.0, 0.02)
            event = TrainingTelemetry(
                federation=_name(fed),
                client_id=client,
                sequence=sequence,
                base_version=0,
                loss_first=loss,
                loss_last=loss - 0.1,
                tokens=100,
                seconds=1.0,
                payload_bytes=100,
            )
            headers = sign_event(event, device_key(client))
            fed.log.append(TELEMETRY, key=client.encode(), value=event.to_bytes(), headers=headers)


def _turn(config: Path) -> None:
    turn = _pyflyte(config, "data_engine")
    try:
        output, _ = turn.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        turn.kill()
        turn.communicate()
        raise
    assert turn.returncode == 0, output[-3000:]


def _pyflyte(config: Path, loop: str, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen:
    command = [sys.executable, "-m", "flytekit.clis.sdk_in_container.pyflyte", "run", f"workflows/{loop}.py", loop]
    scratch = config.parent / "tmp"
    scratch.mkdir(exist_ok=True)
    output = subprocess.PIPE if stdin == subprocess.DEVNULL else open(config.parent / f"{loop}.log", "wb")  # noqa: SIM115
    return subprocess.Popen(
        [*command, "--config", str(config), *arguments],
        cwd=ROOT,
        env={**_environment(), "TMPDIR": str(scratch)},
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def _trigger(config: Path, admin: AdminStandIn) -> Iterator[None]:
    with open(config.parent / "trigger.log", "wb") as output:
        trigger = subprocess.Popen(
            [sys.executable, "-m", "services.trigger", "--config", str(config), "--poll-s", "0.2"],
            cwd=ROOT,
            env={**_environment(), **admin.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
        finally:
            trigger.terminate()
            try:
                trigger.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                trigger.kill()
                trigger.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _alive(admin: RunningAdmin, since: float) -> None:
    ended = [run.returncode for run in admin.runs if run.poll() is not None]
    if ended or time.monotonic() - since > PATIENCE_S:
        raise RuntimeError(
            f"no candidate: {len(admin.runs)} rounds launched, ended with {ended}, see round and trigger"
        )

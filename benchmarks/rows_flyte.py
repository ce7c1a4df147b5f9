"""The cluster's edge: what survives `kill -9` of the services between the log and Flyte, and what the data engine does.

Items 3 and 4 of issue 5. The log is a real broker, the connector and the trigger are the commands that an operator
runs; Flyte is a stand-in that speaks flyteidl's gRPC (`tests/flyte/admin_stand_in.py`), and propeller's side is played
by the test.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.registry import Reading, figure
from services.embedded import EmbeddedBroker
from tests.flyte.drift import DriftRun, drift_to_candidate
from tests.flyte.kills import describe, kill_connector, kill_trigger
from tests.tier1.loops.telemetry_noise import false_alarms

KILLS, SEED = 50, 20261122
DRIFTS = 5


@figure("trigger.kills", unit="1", bound="== 50", cls="full")
def trigger_kills() -> float:
    """Kills -9 of the trigger, of 50 at random times and failpoints, after which each task has one execution."""
    found = _on_a_broker(kill_trigger)
    if found.lost or found.doubled or found.not_buried or found.last_exit:
        raise RuntimeError(f"seed {SEED}: {found}")
    return found.kills


@figure("sensor.kills", unit="1", bound="== 50", cls="full")
def sensor_kills() -> float:
    """Kills -9 of the connector, of 50 at random times, after which the cuts tile the log with the right digests."""
    found = _on_a_broker(kill_connector)
    if found.gaps or found.wrong_digests or not found.records:
        raise RuntimeError(f"seed {SEED}: {found}")
    return found.kills


@figure("data_engine.drift_to_candidate", unit="s", bound="<= 120", cls="full")
def data_engine_drift_to_candidate() -> Reading:
    """Time from a planted drift in telemetry to one launched round and its one candidate, unattended, tiny model."""
    return Reading.of([_one_drift(SEED + number).seconds for number in range(DRIFTS)])


@figure("data_engine.false_alarms", unit="1", bound="<= 1", cls="quick")
def data_engine_false_alarms() -> float:
    """Drifts raised in 10,000 hourly turns over six devices whose loss scatters by 0.2 nats and does not drift."""
    return false_alarms(turns=10_000, devices=6, spread=0.2, every=1, seed=SEED)


def _one_drift(seed: int) -> DriftRun:
    with tempfile.TemporaryDirectory() as scratch, EmbeddedBroker(Path(scratch) / "broker") as broker:
        found = drift_to_candidate(Path(scratch) / "federation", broker.bootstrap, seed=seed)
    print(f"seed {seed}: {found}", file=sys.stderr)
    if (found.tasks, len(found.admitted), found.candidates, found.waiting) != (["north"], 1, 1, 1):
        raise RuntimeError(f"seed {seed}: {found}")
    return found


def _on_a_broker(scenario: Callable):
    with tempfile.TemporaryDirectory() as scratch, EmbeddedBroker(Path(scratch) / "broker") as broker:
        found = scenario(Path(scratch) / "kills", broker.bootstrap, kills=KILLS, seed=SEED)
    print(f"seed {SEED}: {describe(found)}", file=sys.stderr)
    return found

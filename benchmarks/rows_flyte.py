"""The cluster's edge: what survives `kill -9` of the services that stand between the log and Flyte.

Item 4 of issue 5. The log is a real broker, the connector and the trigger are the commands that an operator runs; Flyte
is a stand-in that speaks flyteidl's gRPC (`tests/flyte/admin_stand_in.py`), and propeller's side is played by the test.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.registry import figure
from services.embedded import EmbeddedBroker
from tests.flyte.kills import describe, kill_connector, kill_trigger

KILLS, SEED = 50, 20261122


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


def _on_a_broker(scenario: Callable):
    with tempfile.TemporaryDirectory() as scratch, EmbeddedBroker(Path(scratch) / "broker") as broker:
        found = scenario(Path(scratch) / "kills", broker.bootstrap, kills=KILLS, seed=SEED)
    print(f"seed {SEED}: {describe(found)}", file=sys.stderr)
    return found

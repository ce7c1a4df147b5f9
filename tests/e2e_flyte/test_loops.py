"""Every workflow with `pyflyte run --remote --wait --copy all`, and the person's decision over FlyteAdmin."""

from __future__ import annotations

import contextlib
import urllib.request
from datetime import timedelta

import msgpack
from flyteidl.core import identifier_pb2
from flyteidl.service import dataproxy_pb2
from flyteidl.service.dataproxy_pb2_grpc import DataProxyServiceStub

from fednested_lib.events import ModelAvailable, WorkflowFailed, parse_event
from fednested_lib.log import CONTROL
from tasks.control.decision import PATIENCE
from tasks.sensors.kafka_window import TASK_TYPE
from tests.e2e_flyte.conftest import DECK_LIMIT_BYTES, Connector, Site
from tests.federation import Device
from tests.flyte.stand_in.executions import Execution
from tests.flyte.stand_in.pods import ColdPods
from tests.flyte.stand_in.server import FlyteStandIn
from tier1.loops.evaluate_and_promote import newest_candidate
from tier1.versions.candidates import load_candidate


def test_core_update(site: Site) -> None:
    """Four tasks in four pods, from the grant to a folded candidate that waits."""
    execution = site.succeed(site.launch("core_update", "core"), "core")
    fed = site.fed
    assert load_candidate(fed.home, newest_candidate(fed).digest).inputs.dense.run_id == "core"
    assert [len(node.attempts) for node in execution.nodes.values()] == [1, 1, 1, 1]


def test_an_approval_by_command_makes_the_champion(site: Site, flyte: FlyteStandIn) -> None:
    """The deck is there before the gate asks; the command's signed token passes it, and the version is crowned."""
    site.fold_core()
    launched = site.launch("evaluate_and_promote", "approved")
    site.wait_for_gate("approved")
    assert "Automatic gate passed" in deck(flyte, "approved", "n1")
    key = str(site.config.parent / "keys" / "approver.key")
    said = site.call(
        "fednested", "approvals", "approve", "--config", str(site.config), "--execution", "approved", "--key", key
    )
    assert said.text.splitlines()[-1] == "sent approve of version 1 to execution approved in fednested/development"
    site.succeed(launched, "approved")
    state = site.fed.chain.state()
    assert (state.champion.version, state.approved) == (1, {1})


def deck(flyte: FlyteStandIn, execution: str, node: str) -> str:
    """Return a deck as Flyte's console gets it: a signed link from the data proxy, then HTTP."""
    import grpc

    name = identifier_pb2.WorkflowExecutionIdentifier(project="fednested", domain="development", name=execution)
    wanted = identifier_pb2.NodeExecutionIdentifier(node_id=node, execution_id=name)
    with grpc.insecure_channel(f"127.0.0.1:{flyte.port}") as channel:
        link = DataProxyServiceStub(channel).CreateDownloadLink(
            dataproxy_pb2.CreateDownloadLinkRequest(
                artifact_type=dataproxy_pb2.ARTIFACT_TYPE_DECK, node_execution_id=wanted
            )
        )
    with urllib.request.urlopen(link.pre_signed_urls.signed_url[0], timeout=20) as answer:
        page = answer.read()
    assert len(page) <= DECK_LIMIT_BYTES
    return page.decode()


def test_a_rejection_is_recorded_and_the_champion_stays(site: Site) -> None:
    """A rejected version ends in a succeeded execution; the version before it stays champion."""
    site.crown()
    Device(site.fed, "ann").send()
    launched = site.launch("nested_round", "rejected")
    site.decide("reject", "rejected", "--reason", "sonnets got worse")
    site.succeed(launched, "rejected")
    state = site.fed.chain.state()
    assert (state.champion.version, state.rejected, state.head.version) == (1, {2}, 1)


def test_a_gate_that_times_out_fails_the_execution(site: Site, flyte: FlyteStandIn) -> None:
    """Two days pass: the execution FAILED with propeller's words, one event says Timeout, and no champion changes."""
    site.crown()
    Device(site.fed, "ann").send()
    launched = site.launch("nested_round", "forgotten")
    site.wait_for_gate("forgotten")
    flyte.pass_time(PATIENCE + timedelta(seconds=1))
    execution = flyte.wait_for_end("forgotten")
    said = launched.end()
    words = "[1/0] currentAttempt done. Last Error: USER::task execution timeout [48h0m0s] expired"
    assert (execution.phase, execution.error.message) == ("FAILED", words)
    assert said.status != 0
    assert words in said.text
    (event,) = announced(site, WorkflowFailed)
    assert (event.workflow, event.error, event.execution) == ("evaluate_and_promote", "Timeout", "forgotten")
    assert site.fed.chain.state().champion.version == 1


def announced(site: Site, kind: type) -> list:
    """Return the events of a kind on the control topic."""
    fed = site.fed
    with contextlib.closing(fed):
        events = [parse_event(each.value) for each in fed.log.read(CONTROL, fed.log.watermarks(CONTROL))]
    return [event for event in events if isinstance(event, kind)]


def test_a_round_folds_devices_asks_and_publishes(site: Site) -> None:
    """Dynamics, sub-workflows and the gate in one execution: core and two devices' updates become the champion."""
    site.crown()
    for client in ("ann", "bob"):
        Device(site.fed, client).send()
    launched = site.launch("nested_round", "round", "--core")
    site.decide("approve", "round", "--version", "3")
    execution = site.succeed(launched, "round")
    assert site.fed.chain.state().champion.version == 3
    assert len(execution.tasks("publish")) == 1


def test_a_broadcast_and_the_data_engine(site: Site) -> None:
    """The two workflows of one task each: the champion is published; the telemetry, none yet, is looked at."""
    site.crown()
    launched = site.launch("broadcast", "broadcast"), site.launch("data_engine", "engine")
    site.succeed(launched[0], "broadcast")
    site.succeed(launched[1], "engine")
    assert [event.version for event in announced(site, ModelAvailable)] == [1]


def test_cold_processes_come_to_the_same_candidate(site: Site, flyte: FlyteStandIn) -> None:
    """The commands as a container would start them fold what the forked ones fold: forking only saves imports."""
    site.crown()
    for client in ("ann", "bob"):
        Device(site.fed, client).send()
    warm = folded(site.succeed(site.launch("aggregate_experts", "warm"), "warm"), site)
    pods, flyte.pods = flyte.pods, ColdPods()
    try:
        cold = folded(site.succeed(site.launch("aggregate_experts", "cold"), "cold"), site)
    finally:
        flyte.pods = pods
    assert cold == warm


def folded(execution: Execution, site: Site) -> tuple:
    digest = msgpack.unpackb(execution.outputs.literals["o0"].scalar.binary.value)["digest"]
    candidate = load_candidate(site.fed.home, digest)
    return len(candidate.accepted), [each.payload_sha256 for each in candidate.accepted], digest


def test_a_sensed_round_outlives_its_connector(site: Site, flyte: FlyteStandIn, connector: Connector) -> None:
    """The sensor waits in a real connector over gRPC that is killed meanwhile; the window closes all the same."""
    flyte.connectors[TASK_TYPE] = f"127.0.0.1:{connector.port}"
    connector.start()
    site.configure("window", max_wait_s=3600.0)  # nothing but the update closes it
    site.crown()
    launched = site.launch("sensed_round", "sensed")
    site.wait_for(lambda: "sensed" in flyte.runs and len(flyte.runs["sensed"].nodes) == 2)
    connector.kill()
    Device(site.fed, "ann").send()
    connector.start()
    site.decide("approve", "sensed")
    execution = site.succeed(launched, "sensed")
    assert [status for status, _ in execution.nodes["n1"].attempts] == [None]
    assert site.fed.chain.state().champion.version == 2
    connector.kill()

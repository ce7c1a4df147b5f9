"""A workflow that fails: told once, in closed words, with the champion as it was and its own error on top."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import click
import pytest
from flytekit.core.context_manager import FlyteContextManager
from flytekit.models.core.identifier import WorkflowExecutionIdentifier
from flytekit.types.error.error import FlyteError
from flytekit.types.file import FlyteFile
from pydantic import ValidationError

from fednested_lib.errors import ChainConflict, ConfigError, ContractError, GovernanceError, PolicyDenied
from fednested_lib.events import LOOPS, WorkflowFailed, verify_event
from fednested_lib.log import CONTROL
from services.gates import answer_gates
from tasks import failures
from tests.federation import Device, make_workspace
from tier1.federation import Federation, open_federation
from tier1.loops.failures import error_class, record_failure
from workflows.aggregate_experts import aggregate_experts
from workflows.aggregate_experts_sharded import aggregate_experts_sharded
from workflows.broadcast import broadcast
from workflows.core_update import core_update
from workflows.data_engine import data_engine
from workflows.data_engine_regions import data_engine_regions
from workflows.evaluate_and_promote import evaluate_and_promote
from workflows.evaluate_suites import evaluate_suites
from workflows.nested_round import nested_round
from workflows.sensed_round import sensed_round

ALL = (core_update, aggregate_experts, evaluate_and_promote, broadcast, nested_round, sensed_round, data_engine)
ALL += (evaluate_suites, aggregate_experts_sharded, data_engine_regions)
POD_ERROR = """Trace:

    Traceback (most recent call last):
      File "/root/tier1/federation.py", line 110, in authorise
    fednested_lib.errors.TransportError: text of a device

Message:

    Recoverable: text of a device"""

GATE_OVER = "[1/0] currentAttempt done. Last Error: USER::task execution timeout [48h0m0s] expired"


def _shared_workspace(directory: Path, **overrides: dict) -> Path:
    """Make a workspace whose home every pod has."""
    path = make_workspace(directory, **overrides)
    path.write_text(path.read_text().replace("home: home\n", f"home: {directory / 'home'}\nhome_is_shared: true\n"))
    return path


@pytest.fixture
def config(tmp_path: Path) -> FlyteFile:
    """A federation whose version 1 is champion and whose version 2 waits for a decision."""
    config = FlyteFile(str(_shared_workspace(tmp_path)))
    with answer_gates(lambda: "approve"):
        evaluate_and_promote(config=config, candidate=core_update(config=config).digest)
    Device(open_federation(config.path), "ann").send()
    return config


@pytest.fixture
def empty(tmp_path: Path) -> FlyteFile:
    """A federation that has done nothing yet."""
    return FlyteFile(str(_shared_workspace(tmp_path)))


@pytest.fixture
def fed(config: FlyteFile) -> Federation:
    return open_federation(config.path)


def told(fed: Federation) -> list[WorkflowFailed]:
    """Return the failures on the control topic, each under tier 1's signature."""
    records = fed.log.read(CONTROL, fed.log.watermarks(CONTROL))
    events = [verify_event(each.value, dict(each.headers), fed.signer.public_key) for each in records]
    return [event for event in events if isinstance(event, WorkflowFailed)]


def in_pod(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let tasks of this test believe that they run in an execution of this name."""
    identifier = WorkflowExecutionIdentifier("fednested", "development", name)
    parameters = FlyteContextManager.current_context().user_space_params
    monkeypatch.setattr(parameters, "_execution_id", identifier)


def test_every_workflow_has_a_handler_of_its_own_name() -> None:
    """None is left out, and none reports under another's name."""
    assert {each.name: each.on_failure.name for each in ALL} == {
        f"workflows.{loop}.{loop}": f"tasks.failures.{loop}_failed" for loop in LOOPS
    }


def test_a_nested_failure_is_told_once_and_by_the_loop_that_failed(config: FlyteFile, fed: Federation) -> None:
    """A slip of the pen at the gate fails round and promotion, one event comes, and champion and head are as before."""
    with answer_gates(lambda: "aprove"), pytest.raises(GovernanceError, match="neither approve, reject"):
        nested_round(config=config)
    (event,) = told(fed)
    assert (event.workflow, event.error, event.node) == ("evaluate_and_promote", "GovernanceError", "")
    state = fed.chain.state()
    assert (state.champion.version, state.head.version, state.approved) == (1, 2, {1})


def test_two_local_failures_are_two_executions(config: FlyteFile, fed: Federation) -> None:
    """All local runs are called `local`; that must not make the second failure a repetition of the first."""
    aggregate_experts(config=config)
    for _ in range(2):
        with answer_gates(lambda: "aprove"), pytest.raises(GovernanceError):
            evaluate_and_promote(config=config)
    first, second = told(fed)
    assert first.execution != second.execution


def test_nobody_at_the_terminal_is_told_too(config: FlyteFile, fed: Federation) -> None:
    """The end of input aborts the run with click's own error, which no handler replaces."""
    aggregate_experts(config=config)
    with answer_gates(lambda: ""), pytest.raises(click.Abort):
        evaluate_and_promote(config=config)
    assert [event.error for event in told(fed)] == ["Other"]


def test_a_gate_that_times_out_is_recorded(config: FlyteFile, fed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Propeller fails the node and calls the handler of every level: one event says Timeout, no champion changes.

    The message is propeller's; a gate that really waits is in tests/e2e_flyte.
    """
    in_pod(monkeypatch, "f3a1")
    before = fed.chain.state().digest
    err = FlyteError(message=GATE_OVER, failed_node_id="n2")
    failures.evaluate_and_promote_failed(config=config, candidate="", channel="console", err=err)
    failures.nested_round_failed(config=config, core=False, channel="console", err=err)
    (event,) = told(fed)
    assert (event.workflow, event.error, event.node, event.execution) == (
        "evaluate_and_promote",
        "Timeout",
        "n2",
        "f3a1",
    )
    assert fed.chain.state().digest == before


def test_a_dead_log_neither_hides_the_error_nor_loses_the_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """While the broker is away the event stays on disk, in seconds; the next failure's handler announces both."""
    empty = FlyteFile(str(_shared_workspace(tmp_path, log={"timeout_s": 120.0})))  # far from what a busy machine takes
    fed = open_federation(empty.path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens on it
        monkeypatch.setenv("FEDNESTED_KAFKA_BOOTSTRAP", f"127.0.0.1:{closed.getsockname()[1]}")
        began = time.monotonic()
        with answer_gates(lambda: "x"), pytest.raises(PolicyDenied, match="may not"):
            deny(empty)
        assert time.monotonic() - began < 60
    monkeypatch.delenv("FEDNESTED_KAFKA_BOOTSTRAP")
    assert "failure.kept" in capsys.readouterr().out
    assert told(fed) == []
    in_pod(monkeypatch, "f3a2")
    failures.broadcast_failed(config=empty, err=FlyteError(message="x", failed_node_id="n0"))
    assert {event.error for event in told(fed)} == {"PolicyDenied", "Other"}
    failures.broadcast_failed(config=empty, err=FlyteError(message="x", failed_node_id="n0"))
    assert len(told(fed)) == 2, "announced once"


def test_a_kept_failure_that_cannot_be_read_blocks_no_other(
    empty: FlyteFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A word that a release renamed leaves its own record behind, named; the failures after it are announced."""
    fed = open_federation(empty.path)
    kept = WorkflowFailed(federation="f", workflow="broadcast", node="", execution="a1", error="Other").to_bytes()
    old = fed.home / "failures" / "a1.json"
    old.parent.mkdir(parents=True)
    old.write_bytes(kept.replace(b"broadcast", b"publish"))
    in_pod(monkeypatch, "f3a1")
    failures.broadcast_failed(config=empty, err=FlyteError(message="x", failed_node_id="n0"))
    assert [event.execution for event in told(fed)] == ["f3a1"]
    out = capsys.readouterr().out
    assert "failure.unreadable" in out
    assert str(old) in out


@pytest.mark.parametrize("node", ["n0_n1", "N0", "n" * 65, "n0\n"])
def test_a_node_that_the_event_cannot_name_costs_its_name_alone(
    empty: FlyteFile, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    """Flyte, not us, names nodes: an id outside the event's pattern is left out, and the failure is told."""
    in_pod(monkeypatch, "f3a1")
    failures.broadcast_failed(config=empty, err=FlyteError(message="x", failed_node_id=node))
    (event,) = told(open_federation(empty.path))
    assert (event.workflow, event.node) == ("broadcast", "")


def deny(config: FlyteFile) -> None:
    """Broadcast under a policy that no longer allows it."""
    policy = open_federation(config.path).config.governance.policy
    policy.write_text(policy.read_text().replace("publish", "read"))
    broadcast(config=config)


def test_a_handler_that_cannot_record_leaves_the_error_alone(empty: FlyteFile) -> None:
    """A home that takes no record costs the event, never the error that the person has to see."""
    home = open_federation(empty.path).home
    home.mkdir(parents=True, exist_ok=True)
    (home / "failures").write_text("in the way")
    with pytest.raises(PolicyDenied, match="may not"):
        deny(empty)


def test_an_unreadable_configuration_is_said_once_and_plainly(tmp_path: Path) -> None:
    """Without a configuration there is no federation to tell; the first error is what comes out."""
    config = make_workspace(tmp_path)
    config.write_text(config.read_text() + "\nrounds: 3\n")
    with pytest.raises(ConfigError, match="unknown key rounds"):
        broadcast(config=FlyteFile(str(config)))


@pytest.mark.parametrize(
    ("message", "raised", "word"),
    [
        (POD_ERROR, None, "TransportError"),
        ("Message:\n\n    PolicyDenied: no", None, "PolicyDenied"),
        (GATE_OVER, None, "Timeout"),
        ("[1/1] currentAttempt done. Last Error: UNKNOWN::Dynamic workflow failed", None, "Timeout"),
        ("Timeout in node", None, "Timeout"),
        (f"{GATE_OVER}: PolicyDenied: no", None, "Other"),
        ("the OOM killer, it says PolicyDenied", None, "Other"),
        ("", ChainConflict("x"), "ChainConflict"),
        ("", ContractError("reused", "x"), "ContractError"),
        ("", KeyError("x"), "Other"),
    ],
)
def test_the_class_is_found_in_a_pods_words_and_in_the_exception(
    message: str, raised: BaseException | None, word: str
) -> None:
    """What Flyte hands over is text; the class in it, and nothing else, becomes the event's word."""
    assert error_class(message, raised) == word


def test_the_event_can_carry_no_text(empty: FlyteFile) -> None:
    """What an error says may quote data: a word that is none of ours or Flyte's makes no event."""
    good = {"workflow": "broadcast", "node": "n0", "execution": "f1", "error": "Other"}
    for field in good:
        with pytest.raises(ValidationError, match=field):
            record_failure(open_federation(empty.path), **{**good, field: "To be, or not"})
    assert json.loads(WorkflowFailed(federation="f", **good).to_bytes()).keys() == {*good, "event", "federation"}

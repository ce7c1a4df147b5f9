"""`fednested approvals`: a decision reaches the gate that waits on Flyte, over the real wire, or a line says why."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fednested_lib.errors import ConfigError, GovernanceError, TransportError
from fednested_lib.signing import Signer
from services.approvals.commands import app
from tests.federation import make_workspace
from tests.flyte.admin_stand_in import AdminStandIn
from tier1.federation import Federation, open_federation
from tier1.governance.approvals import parse_decision
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import settle_candidate, waiting_versions
from tier1.loops.records import GATE


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation whose version 1 waits for a decision."""
    path = make_workspace(tmp_path_factory.mktemp("federation"))
    add_version(open_federation(path))
    return path


def add_version(fed: Federation) -> None:
    run = f"run-{time.time_ns()}"
    delta = train_delta(fed, pack_datasets(fed, authorise_training(fed, run)), run)
    assert settle_candidate(fed, fold_dense(fed, delta)).status == "head"


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[AdminStandIn]:
    with AdminStandIn() as admin:
        for name, value in admin.environment.items():
            monkeypatch.setenv(name, value)
        admin.run("busy")
        admin.run("done", "SUCCEEDED")
        admin.reach_gate("f1", GATE)
        yield admin


def call(command: str, config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [command, "--config", str(config), *arguments])


def send(verdict: str, config: Path, *arguments: str, execution: str = "f1", key: Path | None = None) -> Result:
    key = key or config.parent / "keys" / "approver.key"
    return call(verdict, config, "--execution", execution, "--key", str(key), *arguments)


@pytest.mark.parametrize("verdict", ["approve", "reject"])
def test_a_decision_arrives_at_the_gate_as_a_signed_token(config: Path, admin: AdminStandIn, verdict: str) -> None:
    """What lies in Flyte's signal is what the workflow's `decide` accepts: verdict, reason, version, approver's key."""
    result = send(verdict, config, "--reason", "sonnets: as before")
    assert result.exit_code == 0, result.exception
    assert result.output == f"sent {verdict} of version 1 to execution f1 in fednested/development\n"
    fed = open_federation(config)
    ((_, manifest),) = waiting_versions(fed)
    token = admin.signals["f1", GATE].value.scalar.primitive.string_value
    decision = parse_decision(token, fed.config.governance.approvers, manifest_digest=manifest)
    assert (decision.verdict, decision.reason, decision.verified) == (verdict, "sonnets: as before", True)


def test_the_list_shows_versions_and_the_gates_that_wait(config: Path, admin: AdminStandIn) -> None:
    """Of all that runs, only an execution whose gate has no answer is listed, however many pages admin needs."""
    for number in range(205):
        admin.run(f"run-{number}")
    admin.reach_gate("z-last", GATE)
    admin.reach_gate("other", "another-gate")
    listed = call("list", config).output.splitlines()
    assert listed[0].startswith("version 1  manifest ")
    assert listed[1:] == [f"gate of execution {name}  in fednested/development" for name in ("f1", "z-last")]
    assert admin.calls["ListExecutions"] == 3
    send("approve", config)
    assert "execution f1" not in call("list", config).output


def test_without_a_flyte_the_list_shows_the_versions(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a laptop nothing names a Flyte: none is asked, and a decision cannot be sent."""
    for name in ("FLYTE_PLATFORM_URL", "FLYTECTL_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(config.parent))
    assert len(call("list", config).output.splitlines()) == 1
    error = send("approve", config).exception
    assert isinstance(error, ConfigError)
    assert "set FLYTE_PLATFORM_URL" in str(error)


@pytest.mark.parametrize(
    ("execution", "says"),
    [
        ("f9", r"execution f9 is not in fednested/development: `fednested approvals list` names"),
        ("busy", r"gate secops-decision of execution busy does not wait, the execution is RUNNING: .* try again"),
        ("done", r"gate secops-decision of execution done does not wait, the execution is SUCCEEDED"),
    ],
)
def test_a_gate_that_does_not_wait_is_one_line(config: Path, admin: AdminStandIn, execution: str, says: str) -> None:
    """A wrong execution, one that has not reached its gate and one that is over: named, with where to look."""
    error = send("approve", config, execution=execution).exception
    assert isinstance(error, GovernanceError)
    with pytest.raises(GovernanceError, match=says):
        raise error
    assert admin.calls["SetSignal"] == 0


def test_an_answer_is_not_overwritten(config: Path, admin: AdminStandIn) -> None:
    """Admin would let a second approver replace the first one's decision; this command does not."""
    assert send("reject", config).exit_code == 0
    first = admin.signals["f1", GATE].SerializeToString()
    error = send("approve", config).exception
    assert isinstance(error, GovernanceError)
    assert "has its answer" in str(error)
    assert admin.signals["f1", GATE].SerializeToString() == first


def test_a_decision_whose_answer_is_lost_is_sent_once_more_in_vain(config: Path, admin: AdminStandIn) -> None:
    """The line says that Flyte did not answer; the same command again finds the decision in its place."""
    admin.lose_answers = 99  # more than flytekit asks again
    assert isinstance(send("reject", config).exception, TransportError)
    admin.lose_answers = 0
    first = admin.signals["f1", GATE].SerializeToString()
    with pytest.raises(GovernanceError, match="has its answer"):
        raise send("reject", config).exception
    assert admin.signals["f1", GATE].SerializeToString() == first


def test_an_unknown_key_signs_nothing(config: Path, admin: AdminStandIn, tmp_path: Path) -> None:
    """A key that is no approver's ends before Flyte is asked."""
    Signer.generate().save(tmp_path / "stranger.key")
    error = send("approve", config, key=tmp_path / "stranger.key").exception
    assert isinstance(error, ConfigError)
    assert "is no registered approver: add it under governance.approvers" in str(error)
    assert not admin.calls


def test_a_reason_out_of_bounds_signs_nothing(config: Path, admin: AdminStandIn) -> None:
    """A reason is one line of at most 400 characters."""
    error = send("reject", config, "--reason", "x" * 401).exception
    assert isinstance(error, GovernanceError)
    assert "reason: String should have at most 400 characters" in str(error)
    assert not admin.calls


def test_a_flyte_that_does_not_answer_is_one_line(config: Path, admin: AdminStandIn) -> None:
    """The address that is dead is for the operator to mend: what to look at is said, and versions are listed first."""
    admin.__exit__()
    error = send("approve", config).exception
    assert isinstance(error, TransportError)
    assert "did not take the decision for execution f1" in str(error)
    assert "see that its admin runs, and FLYTE_PLATFORM_URL" in str(error)
    listed = call("list", config)
    assert isinstance(listed.exception, TransportError)
    assert listed.output.startswith("version 1  manifest ")


def test_of_several_versions_one_is_named(tmp_path: Path, admin: AdminStandIn) -> None:
    """Which one a gate asks about stands in its report; a guess could decide on the wrong one."""
    config = make_workspace(tmp_path)
    error = send("approve", config).exception
    assert isinstance(error, GovernanceError)
    assert str(error).startswith("no version waits for a decision: ")
    for _ in range(2):
        add_version(open_federation(config))
    error = send("approve", config).exception
    assert "2 versions wait (1, 2), one is decided on at a time" in str(error)
    assert send("approve", config, "--version", "2").exit_code == 0
    payload = admin.signals["f1", GATE].value.scalar.primitive.string_value.split(".")[0]
    assert json.loads(base64.urlsafe_b64decode(payload + "=="))["verdict"] == "approve"

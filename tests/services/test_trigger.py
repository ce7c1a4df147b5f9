"""The trigger: one execution per task, in memory, over real gRPC against the stand-in, and as a process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
import requests
import typer
from flytekit.clients.auth.exceptions import AccessTokenNotFoundError, AuthenticationError, AuthenticationPending
from typer.testing import CliRunner

from fednested_lib.errors import ConfigError, ContractError, EnvelopeError, LogError, TransportError
from fednested_lib.events import SIGNATURE_HEADER, TASK_KINDS, TrainingTask, parse_event
from fednested_lib.log import DEAD_TASKS, TASKS, InMemoryLog, KafkaLog
from fednested_lib.signing import Signer, canonical_json
from services.trigger import __main__ as main
from services.trigger import service
from services.trigger.inbox import InMemoryPositions, KafkaPositions, Position
from services.trigger.launch import ROUTES, Order, order_of
from services.trigger.remote import FlyteLauncher
from services.trigger.service import Trigger
from tests.federation import make_workspace
from tests.flyte.admin_stand_in import DOMAIN, PROJECT, AdminStandIn
from tests.flyte.kills import TIER1, send_task, trigger_world
from tier1.commands import app as tier1_app
from tier1.federation import open_federation
from tier1.workspace import create_workspace

ROOT = Path(__file__).resolve().parents[2]


class ListLauncher:
    """A Flyte of one list: launches by name once, and says busy or nothing when it is told to."""

    def __init__(self):
        self.launched: list[str] = []
        self.busy: set[str] = set()
        self.reachable = True

    def launch(self, order: Order) -> bool:
        if not self.reachable:
            raise TransportError("no answer: start it")
        if order.plan in self.busy:
            return False
        if order.name not in self.launched:
            self.launched.append(order.name)
        return True


class World:
    def __init__(self):
        self.log = InMemoryLog()
        self.log.create_topics({TASKS: 1, DEAD_TASKS: 1})
        self.positions, self.launcher, self.now = InMemoryPositions(), ListLauncher(), 0.0
        self.restart()

    def restart(self) -> None:
        self.trigger = Trigger(
            self.log,
            self.positions,
            self.launcher,
            federation="fednested",
            trusted=frozenset({TIER1.public_key}),
            routes=ROUTES,
            clock=lambda: self.now,
        )

    def turn(self, after_s: float = 0.0) -> None:
        self.now += after_s
        self.trigger.turn()

    @property
    def committed(self) -> int:
        return self.positions.load(TASKS, [0]).get(0, Position(offset=0)).offset

    @property
    def dead(self) -> list[dict[str, str]]:
        records = self.log.read(DEAD_TASKS, self.log.watermarks(DEAD_TASKS))
        return [{name: value.decode() for name, value in record.headers} for record in records]


@pytest.fixture
def world() -> World:
    return World()


def name_of(task_id: str, kind: str = "aggregate") -> str:
    return order_of(TrainingTask(federation="fednested", task_id=task_id, kind=kind), ROUTES).name


def test_the_name_is_a_function_of_the_task_and_valid_in_flyte() -> None:
    """Same id, same name, in every process and release and whatever the kind; Flyte's bounds hold."""
    # printf 'fednested/drift-eu-17' | sha256sum | cut -c1-20
    assert name_of("drift-eu-17") == "task-f6033c67a96ac7f6eee3"
    longest = TrainingTask(federation="f", task_id="x" * 128, kind="k" * 32)
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,62}", order_of(longest, {"k" * 32: "p"}).name)
    assert name_of("a") == name_of("a", "core_update")
    other = order_of(TrainingTask(federation="other", task_id="a", kind="aggregate"), ROUTES).name
    assert len({name_of("a"), name_of("b"), other}) == 3


def test_a_task_that_is_sent_twice_is_launched_once(world: World) -> None:
    """The sender's second try has the same id: one execution, both records settled."""
    for _ in range(2):
        send_task(world.log, "a")
    world.turn()
    assert world.launcher.launched == [name_of("a")]
    assert world.committed == 2


def test_nothing_is_committed_before_the_launch_is_confirmed(world: World) -> None:
    """While Flyte does not answer the offset stays, the task is tried again later, and a restart reads it anew."""
    send_task(world.log, "a")
    world.launcher.reachable = False
    world.turn()
    assert world.committed == 0
    world.launcher.reachable = True
    world.turn(after_s=0.5)
    assert world.launcher.launched == []
    world.turn(after_s=0.6)
    assert (world.launcher.launched, world.committed) == ([name_of("a")], 1)


def test_a_skipped_launch_waits_and_holds_up_nobody_but_the_offset(world: World) -> None:
    """The plan is busy: its task comes again with growing pauses; another plan's goes on; a restart loses neither."""
    send_task(world.log, "slow", kind="core_update")
    send_task(world.log, "quick")
    world.launcher.busy = {"nested_round_nightly"}
    world.turn()
    world.turn(after_s=1.0)
    world.turn(after_s=1.5)  # the second pause is two seconds
    (waiting,) = world.trigger._waiting.values()
    assert (world.launcher.launched, world.committed, waiting.tries) == ([name_of("quick")], 0, 2)
    world.restart()
    world.launcher.busy = set()
    world.turn()
    assert world.launcher.launched == [name_of("quick"), name_of("slow", "core_update")]
    assert world.committed == 2


def test_a_poisoned_task_is_buried_with_its_reason_and_the_next_one_goes_on(world: World) -> None:
    """No bytes that anybody can send stop the trigger; each ends on the dead-letter topic with a word and a remedy."""
    world.log.append(TASKS, key=b"", value=b"\xff not json", headers={})
    send_task(world.log, "odd", kind="make_coffee")
    send_task(world.log, "forged", signer=Signer.generate())
    unsigned = TrainingTask(federation="fednested", task_id="bare", kind="aggregate")
    world.log.append(TASKS, key=b"", value=unsigned.to_bytes(), headers={})
    send_task(world.log, "good")
    world.turn()
    assert [dead["fednested-reason"] for dead in world.dead] == [
        "bad_event",
        "unknown_kind",
        "bad_signature",
        "bad_signature",
    ]
    assert "aggregate, core_update, got make_coffee" in world.dead[1]["fednested-detail"]
    assert (world.launcher.launched, world.committed) == ([name_of("good")], 5)


def test_a_record_as_large_as_the_log_admits_is_buried(world: World) -> None:
    """Neither a signature nor a field name that fills the record keeps its reason from the dead letters."""
    task = TrainingTask(federation="fednested", task_id="big", kind="aggregate")
    world.log.append(TASKS, key=b"", value=task.to_bytes(), headers={SIGNATURE_HEADER: b"0" * 999_890})
    long_name = "x" * 999_890
    world.log.append(TASKS, key=b"", value=canonical_json({**task.model_dump(), long_name: 1}), headers={})
    send_task(world.log, "good")
    world.turn()
    assert [dead["fednested-reason"] for dead in world.dead] == ["bad_signature", "bad_event"]
    assert (world.launcher.launched, world.committed) == ([name_of("good")], 3)


def test_another_federation_on_the_same_log_is_passed_over(world: World) -> None:
    """Its tasks are neither launched nor buried here."""
    send_task(world.log, "a", federation="other")
    world.turn()
    assert (world.launcher.launched, world.dead, world.committed) == ([], [], 1)


@pytest.mark.parametrize(
    ("changed", "federation"), [({}, "other"), ({"--project": "p2"}, "fed"), ({"--domain": "production"}, "fed")]
)
def test_triggers_on_one_broker_have_groups_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], federation: str
) -> None:
    """A group that two federations, projects or domains share would commit past the other's tasks."""
    groups: list[str] = []

    class Opened(Exception):
        pass

    def positions(bootstrap: str, *, group: str) -> None:
        groups.append(group)
        raise Opened

    monkeypatch.setattr(main, "KafkaPositions", positions)
    monkeypatch.setattr(main, "_told_to_stop", threading.Event)  # else the signals of this very process
    app = typer.Typer()
    app.command()(main.run)
    for name, options in (("fed", {}), (federation, changed)):
        config = create_workspace(tmp_path / str(len(groups)), datasets={}, suites={}, overrides={"federation": name})
        arguments = [word for option in ({"--config": str(config)} | options).items() for word in option]
        assert isinstance(CliRunner().invoke(app, arguments).exception, Opened)
    assert groups[0] == "fednested-trigger.fed.fednested.development"
    assert groups[0] != groups[1]


def test_a_log_that_forgot_what_was_settled_stops_the_trigger(world: World) -> None:
    """A wiped log would be read from the wrong place: one line with the offsets and what to do."""
    world.positions.save(TASKS, {0: Position(offset=7)})
    with pytest.raises(LogError, match=r"ends at offset 0, but tasks up to 7 .* reset the trigger's group"):
        world.turn()


@pytest.mark.parametrize("same_name", [False, True])
@pytest.mark.parametrize("restarted", [False, True])
def test_another_log_with_the_same_offsets_is_read_from_its_beginning(
    world: World, same_name: bool, restarted: bool
) -> None:
    """A wiped broker that gave the offsets anew shows by the log's identity, else by the last settled record."""
    send_task(world.log, "a")
    world.turn()
    world.log = InMemoryLog(name=world.log.name if same_name else None)
    world.log.create_topics({TASKS: 1, DEAD_TASKS: 1})
    for task_id in ("b", "c"):
        send_task(world.log, task_id)
    if restarted:
        world.restart()
    else:
        world.trigger._log = world.log
    world.turn()
    assert world.launcher.launched == [name_of(task_id) for task_id in ("a", "b", "c")]
    assert world.committed == 2
    world.restart()
    world.turn()
    assert (len(world.launcher.launched), world.committed) == (3, 2), "what is committed now is this log's"


def test_another_log_that_is_shorter_is_read_from_its_beginning(world: World) -> None:
    """The identity says that nothing was lost: an offset beyond the end stops the trigger in the same log only."""
    for task_id in ("a", "b"):
        send_task(world.log, task_id)
    world.turn()
    world.log = InMemoryLog()
    world.log.create_topics({TASKS: 1, DEAD_TASKS: 1})
    send_task(world.log, "c")
    world.restart()
    world.turn()
    assert (world.launcher.launched[2:], world.committed) == ([name_of("c")], 1)


def test_tasks_that_retention_took_are_stepped_over(world: World) -> None:
    """A trigger that was off for longer than the retention goes on with what is left."""
    for task_id in ("old", "new"):
        send_task(world.log, task_id)
    world.positions.save(TASKS, {0: Position(offset=0)})
    world.log.delete_before(TASKS, 0, 1)
    world.turn()
    assert (world.launcher.launched, world.committed) == ([name_of("new")], 2)


def test_reading_ahead_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a busy plan no more than so many tasks are held; the rest is read when there is room, and none is lost."""
    monkeypatch.setattr(service, "MAX_WAITING", 2)
    for number in range(5):
        send_task(world.log, f"t{number}")
    world.launcher.busy = {"nested_round_fast"}
    for _ in range(3):
        world.turn(after_s=10.0)
    assert len(world.trigger._waiting) == 2
    world.launcher.busy = set()
    for _ in range(3):
        world.turn(after_s=400.0)
    assert (len(world.launcher.launched), world.committed) == (5, 5)


def test_an_unreachable_log_is_waited_for_until_told_to_stop(world: World) -> None:
    """The broker's restart does not end the service, and a stop ends the wait."""
    world.log.reachable = False
    stop = threading.Event()
    thread = threading.Thread(target=world.trigger.run, args=(stop,), kwargs={"poll_s": 0.01})
    thread.start()
    stop.set()
    thread.join(60)
    assert not thread.is_alive()


def test_a_task_can_be_requested_by_hand(tmp_path: Path) -> None:
    """What `fednested tier1 request` appends is what the trigger takes."""
    config = make_workspace(tmp_path)
    arguments = ["request", "--config", str(config), "--task-id", "a"]
    done = CliRunner().invoke(tier1_app, [*arguments, "--kind", "aggregate"])
    assert "requested aggregate as task a" in done.output
    fed, launcher = open_federation(config), ListLauncher()
    trusted = frozenset(fed.config.identity.trusted)
    Trigger(
        fed.log, InMemoryPositions(), launcher, federation=fed.config.federation, trusted=trusted, routes=ROUTES
    ).turn()
    assert launcher.launched == [name_of("a")]


def test_a_kind_that_no_trigger_routes_is_refused_where_it_is_typed(tmp_path: Path) -> None:
    """`requested` is not said of a task that would only be buried; --any-kind is for a trigger with other routes."""
    config = make_workspace(tmp_path)
    request = ["request", "--config", str(config), "--kind"]
    refused = CliRunner().invoke(tier1_app, [*request, "make_coffee"]).exception
    assert isinstance(refused, ConfigError)
    assert "--kind must be one of aggregate, core_update, got make_coffee" in str(refused)
    fed = open_federation(config)
    assert fed.log.watermarks(TASKS) == {0: (0, 0)}
    assert "requested make_coffee" in CliRunner().invoke(tier1_app, [*request, "make_coffee", "--any-kind"]).output
    assert isinstance(CliRunner().invoke(tier1_app, [*request, "Coffee!", "--any-kind"]).exception, EnvelopeError)
    assert set(ROUTES) == set(TASK_KINDS)


def test_two_requests_in_one_second_are_two_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --task-id every request is a new task."""
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 1, 1, 0, 0, 0, 3, 1, 0)))
    config = make_workspace(tmp_path)
    for _ in range(2):
        CliRunner().invoke(tier1_app, ["request", "--config", str(config), "--kind", "aggregate"])
    records = open_federation(config).log.read(TASKS, {0: (0, 2)})
    assert len({parse_event(record.value).task_id for record in records}) == 2


# over gRPC ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch):
    with AdminStandIn() as admin:
        for name, value in admin.environment.items():
            monkeypatch.setenv(name, value)
        yield admin


@pytest.fixture
def launcher(admin: AdminStandIn) -> FlyteLauncher:
    from services.trigger.remote import connect

    return connect(PROJECT, DOMAIN)


def order(task_id: str = "a", kind: str = "aggregate") -> Order:
    return order_of(TrainingTask(federation="fednested", task_id=task_id, kind=kind), ROUTES)


def test_a_launch_over_grpc_is_confirmed_and_its_repetition_finds_it(
    admin: AdminStandIn, launcher: FlyteLauncher
) -> None:
    """The execution carries the kind and the task's digest; the second launch is no second execution."""
    assert launcher.launch(order())
    assert launcher.launch(order())
    assert admin.admitted == [order().name]
    spec = admin.executions[order().name].spec
    assert spec.launch_plan.name == "nested_round_fast"
    assert dict(spec.labels.values) == {"fednested-trigger": "aggregate"}
    assert dict(spec.annotations.values) == {"fednested/task-sha256": order().digest}


def test_an_answer_that_is_lost_is_no_second_execution(admin: AdminStandIn, launcher: FlyteLauncher) -> None:
    """Admin admitted and could not say so: flytekit's own retry meets the execution."""
    admin.lose_answers = 1
    assert launcher.launch(order())
    assert admin.admitted == [order().name]


def test_a_skip_by_the_concurrency_policy_is_told_apart_from_a_taken_name(
    admin: AdminStandIn, launcher: FlyteLauncher
) -> None:
    """Both are ALREADY_EXISTS on the wire; only one of them has an execution."""
    admin.busy = {"nested_round_fast"}
    assert launcher.launch(order()) is False
    admin.busy = set()
    assert launcher.launch(order())
    admin.busy = {"nested_round_fast"}
    assert launcher.launch(order()), "launched before: the policy has nothing to say any more"


def test_an_id_that_is_used_for_another_task_is_named(admin: AdminStandIn, launcher: FlyteLauncher) -> None:
    """Same id, another kind: no second execution, and not silently taken for done."""
    assert launcher.launch(order())
    with pytest.raises(ContractError) as error:
        launcher.launch(order(kind="core_update"))
    assert error.value.reason == "task_id_reused"
    assert admin.admitted == [order().name]


def test_what_flyte_refuses_is_poison_and_what_may_pass_is_not(admin: AdminStandIn, launcher: FlyteLauncher) -> None:
    """INVALID_ARGUMENT is for the dead letters; a plan that is not active, or no Flyte at all, is waited for."""
    with pytest.raises(ContractError, match="invalid execution name") as error:
        launcher.launch(Order(name="Not-Valid", plan="nested_round_fast", kind="aggregate", digest=""))
    assert error.value.reason == "launch_refused"
    admin.plans.clear()
    with pytest.raises(
        TransportError, match="no active launch plan nested_round_fast in fednested/development.*--activate"
    ):
        launcher.launch(order())
    admin.__exit__()
    with pytest.raises(TransportError, match="see that its admin runs, and FLYTE_PLATFORM_URL"):
        launcher.launch(order())


def test_a_plan_that_vanishes_before_the_launch_is_no_skip(admin: AdminStandIn, launcher: FlyteLauncher) -> None:
    """NOT_FOUND of CreateExecution is waited for with its own remedy, not taken for the concurrency policy."""
    admin.vanishing = True
    with pytest.raises(TransportError, match=r"no launch plan nested_round_fast.*register the"):
        launcher.launch(order())


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("token endpoint says no"),
        AuthenticationPending("not yet"),
        AccessTokenNotFoundError("no token"),
        requests.ConnectionError("no route to the identity provider"),
        grpc.RpcError("no metadata of the authorisation server"),
    ],
)
def test_a_login_that_fails_is_waited_for(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """flytekit's login errors are no FlyteException; an identity provider's outage must not end the trigger."""
    from flytekit.clients.friendly import SynchronousFlyteClient

    from services.trigger.remote import connect

    def refuse(*_: object, **__: object):
        raise error

    monkeypatch.setattr(SynchronousFlyteClient, "get_active_launch_plan", refuse)
    monkeypatch.setenv("FLYTE_PLATFORM_URL", "127.0.0.1:1")
    monkeypatch.setenv("FLYTE_PLATFORM_INSECURE", "true")
    with pytest.raises(TransportError, match="the credentials"):
        connect(PROJECT, DOMAIN).launch(order())


# as a process ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_commit_keeps_the_log_it_is_of(kafka_bootstrap: str) -> None:
    """Identity and digest come back from a real broker; a commit without them, of an older trigger, is read too."""
    topic = f"positions.{time.time_ns()}"
    with contextlib.closing(KafkaLog(kafka_bootstrap)) as log:
        log.create_topics({topic: 1})
        position = Position(offset=3, log_id=log.identity(topic), digest="d" * 64)
    with contextlib.closing(KafkaPositions(kafka_bootstrap, group=topic)) as positions:
        assert positions.load(topic, [0]) == {}
        for saved in (position, Position(offset=4)):
            positions.save(topic, {0: saved})
            assert positions.load(topic, [0]) == {0: saved}


@pytest.mark.slow
def test_the_process_launches_and_ends_on_sigterm(tmp_path: Path, kafka_bootstrap: str) -> None:
    """`python -m services.trigger` on a real broker: a launch, the committed offset, and exit 0 on SIGTERM."""
    with AdminStandIn() as admin, trigger_world(tmp_path, kafka_bootstrap) as (log, config, group):
        start = log.watermarks(TASKS)[0][1]
        send_task(log, f"t{start}", federation=group)
        process = subprocess.Popen(
            [sys.executable, "-m", "services.trigger", "--config", str(config), "--group", group, "--poll-s", "0.1"],
            cwd=ROOT,
            env={**os.environ, **admin.environment, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 180
        while not admin.admitted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert len(admin.admitted) == 1, said
    assert process.returncode == 0, said
    assert '"event": "trigger.stopped"' in said

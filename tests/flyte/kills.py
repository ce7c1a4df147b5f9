"""`kill -9` of the trigger and of the connector at random, on a real broker: what was lost, what was doubled.

Used with few kills by the tests and with fifty by the figures `trigger.kills` and `sensor.kills`.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGTERM

import grpc
from flyteidl.admin.agent_pb2 import CreateTaskRequest, GetTaskRequest, TaskCategory
from flyteidl.core.execution_pb2 import TaskExecution
from flyteidl.service.agent_pb2_grpc import AsyncAgentServiceStub
from flytekit import FlyteContextManager
from flytekit.core.type_engine import TypeEngine
from flytekit.models.literals import LiteralMap

from fednested_lib.events import TrainingTask, sign_event
from fednested_lib.log import DEAD_TASKS, TASKS, KafkaLog, UpdateLog, records_digest
from fednested_lib.signing import Signer
from services.trigger.inbox import KafkaPositions
from services.trigger.launch import ROUTES, order_of
from tests.flyte.admin_stand_in import AdminStandIn
from tests.flyte.zygote import Zygote
from tier1.loops.records import TakenCut, Window
from tier1.workspace import create_workspace

TIER1 = Signer.from_seed(bytes(32))
FAILPOINTS = ("trigger.before_launch", "trigger.after_launch", "trigger.after_burial", "trigger.before_commit")
PATIENCE_S = 90.0


def send_task(
    log: UpdateLog, task_id: str, *, kind: str = "aggregate", federation: str = "fednested", signer: Signer = TIER1
) -> TrainingTask:
    """Append a signed task, as tier 1 does."""
    task = TrainingTask(federation=federation, task_id=task_id, kind=kind)
    log.append(TASKS, key=task_id.encode(), value=task.to_bytes(), headers=sign_event(task, signer))
    return task


@contextlib.contextmanager
def trigger_world(directory: Path, bootstrap: str) -> Iterator[tuple[KafkaLog, Path, str]]:
    """Yield a log with the trigger's topics, a tier1.yaml that trusts `TIER1`, and a name for federation and group."""
    name = f"kills-{uuid.uuid4().hex[:12]}"
    config = create_workspace(
        directory,
        datasets={},
        suites={},
        overrides={
            "federation": name,
            "log": {"bootstrap": bootstrap},
            "identity": {"trusted": {TIER1.public_key: "tier1"}},
        },
    )
    log = KafkaLog(bootstrap)
    log.create_topics({TASKS: 1, DEAD_TASKS: 1})
    try:
        yield log, config, name
    finally:
        log.close()


@dataclass(frozen=True, kw_only=True)
class TriggerKills:
    """What fifty deaths left: every list must be empty."""

    kills: int
    tasks: int
    repeated: int
    lost: list[str]
    doubled: list[str]
    not_buried: list[str]
    last_exit: int


def kill_trigger(directory: Path, bootstrap: str, *, kills: int, seed: int) -> TriggerKills:
    """Send tasks while the trigger is killed `kills` times, at random or at a failpoint, then let it finish."""
    directory.mkdir(parents=True, exist_ok=True)
    rng, numbers = random.Random(seed), itertools.count()
    tasks: list[TrainingTask] = []
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(AdminStandIn())
        admin.delay_s = 0.02
        log, config, name = stack.enter_context(trigger_world(directory / "world", bootstrap))
        arguments = ["--config", str(config), "--group", name, "--poll-s", "0.02"]
        zygote = stack.enter_context(Zygote("trigger", arguments, admin.environment, directory / "trigger.log"))
        start = log.watermarks(TASKS)[0][1]
        for life in range(kills):
            for _ in range(rng.randint(1, 3)):
                kind = rng.choice(("aggregate", "core_update", "aggregate", "make_coffee"))
                task = send_task(log, f"t{next(numbers)}", kind=kind, federation=name)
                tasks.append(task)
                if rng.random() < 0.2:
                    send_task(log, task.task_id, kind=kind, federation=name)
            admin.busy = {plan for plan in admin.plans if rng.random() < 0.2}
            admin.lose_answers = rng.randint(0, 1)
            _one_life(zygote, rng, failpoint=life % 2 == 1)
        admin.busy, admin.lose_answers = set(), 0
        end = log.watermarks(TASKS)[0][1]
        zygote.start()
        positions = KafkaPositions(bootstrap, group=name)
        _wait_until(lambda: _committed(positions) == end)
        last_exit = zygote.end(SIGTERM)
        positions.close()
        dead = {record.value for record in log.read(DEAD_TASKS, log.watermarks(DEAD_TASKS))}
    wanted = {order_of(task, ROUTES).digest for task in tasks if task.kind in ROUTES}
    got = [execution.spec.annotations.values["fednested/task-sha256"] for execution in admin.executions.values()]
    return TriggerKills(
        kills=kills,
        tasks=end - start,
        repeated=admin.calls["CreateExecution"] - len(admin.admitted),
        lost=sorted(wanted - set(got)),
        doubled=sorted(digest for digest in set(got) if got.count(digest) > 1),
        not_buried=sorted(task.task_id for task in tasks if task.kind not in ROUTES and task.to_bytes() not in dead),
        last_exit=last_exit,
    )


def _committed(positions: KafkaPositions) -> int | None:
    """Return the committed offset; None as long as no life was long enough for a commit."""
    found = positions.load(TASKS, [0]).get(0)
    return found.offset if found else None


def _one_life(zygote: Zygote, rng: random.Random, *, failpoint: bool) -> None:
    if not failpoint:
        zygote.start()
        time.sleep(rng.uniform(0.0, 0.8))
        assert zygote.end() == -9
        return
    zygote.start(FEDNESTED_FAILPOINT=f"{rng.choice(FAILPOINTS)}:{rng.randint(1, 2)}")
    timer = threading.Timer(3.0, zygote_kill, (zygote.pid,))  # a life in which the point is not passed
    timer.start()
    status = zygote.wait()
    timer.cancel()
    assert status == -9, status


def zygote_kill(pid: int) -> None:
    """Kill a child that may be gone already."""
    import os

    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)


@dataclass(frozen=True, kw_only=True)
class SensorKills:
    """What the connector's deaths left: every record in exactly one cut, every digest right."""

    kills: int
    records: int
    cuts: list[TakenCut]
    gaps: list[str]
    wrong_digests: int
    refused_calls: int


def kill_connector(directory: Path, bootstrap: str, *, kills: int, seed: int) -> SensorKills:
    """Open window after window over gRPC, as propeller does, while the served connector is killed `kills` times."""
    rng, topic = random.Random(seed), f"kills.{uuid.uuid4().hex[:12]}"
    port, metrics_port = _free_port(), _free_port()
    arguments = ["serve", "connector", "--port", str(port), "--prometheus_port", str(metrics_port)]
    arguments += ["--modules", "tasks.sensors.kafka_window"]
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(KafkaLog(bootstrap)))
        log.create_topics({topic: 3})
        zygote = stack.enter_context(Zygote("connector", arguments, {}, directory / "connector.log"))
        propeller = stack.enter_context(Propeller(port))
        killer = Killer(zygote, port, random.Random(seed + 1), kills)
        zygote.start()
        killer.start()
        stack.callback(killer.join)
        cuts: list[TakenCut] = []
        while killer.is_alive() or sum(cut.n_records for cut in cuts) < _total(log, topic):
            if killer.is_alive():
                for _ in range(rng.randint(0, 4)):
                    log.append(topic, key=b"%d" % rng.randrange(99), value=rng.randbytes(50), headers={})
            cuts.append(propeller.wait_for_cut(_window(log, bootstrap, topic, cuts, rng)))
        killer.join()
        ends = {str(partition): high for partition, (_, high) in log.watermarks(topic).items()}
        wrong = sum(_digest(log, cut) != cut.records_digest for cut in cuts)
        records = _total(log, topic)
    return SensorKills(
        kills=killer.done,
        records=records,
        cuts=cuts,
        gaps=list(_gaps(cuts, ends)),
        wrong_digests=wrong,
        refused_calls=propeller.refused,
    )


class Killer(threading.Thread):
    """Kills the running connector after a random time and starts it again, `kills` times; leaves it running."""

    def __init__(self, zygote: Zygote, port: int, rng: random.Random, kills: int):
        super().__init__(daemon=True)
        self._zygote, self._port, self._rng, self._kills, self.done = zygote, port, rng, kills, 0

    def run(self) -> None:
        for life in range(self._kills):
            if life % 4:  # the others die while they start
                self._wait_until_it_serves()
            time.sleep(self._rng.uniform(0.0, 0.8))
            if self._zygote.end() == -9:
                self.done += 1
            self._zygote.start()

    def _wait_until_it_serves(self) -> None:
        for _ in range(int(PATIENCE_S / 0.05)):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError("the connector did not start")


class Propeller:
    """Flyte's side of a connector task: create until it is accepted, then get until it is done."""

    def __init__(self, port: int):
        quick = [(f"grpc.{which}_reconnect_backoff_ms", 50) for which in ("initial", "min", "max")]
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=quick)
        self._stub = AsyncAgentServiceStub(self._channel)
        self.refused = 0

    def __enter__(self) -> Propeller:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def wait_for_cut(self, window: Window) -> TakenCut:
        """Return the cut of a window; the resource meta is all that is kept between two calls.

        Raises:
            RuntimeError: the task failed.
            TimeoutError: no cut in time.
        """
        deadline = time.monotonic() + PATIENCE_S
        meta = self._call(self._stub.CreateTask, _create_request(window), deadline).resource_meta
        request = GetTaskRequest(task_category=TaskCategory(name="fednested_kafka_window"), resource_meta=meta)
        while True:
            resource = self._call(self._stub.GetTask, request, deadline).resource
            if resource.phase == TaskExecution.SUCCEEDED:
                outputs = LiteralMap.from_flyte_idl(resource.outputs)
                context = FlyteContextManager.current_context()
                return TypeEngine.literal_map_to_kwargs(context, outputs, {"o0": TakenCut})["o0"]
            if resource.phase != TaskExecution.RUNNING:
                raise RuntimeError(resource.message)
            time.sleep(0.05)

    def _call(self, call, request, deadline: float):
        while time.monotonic() < deadline:
            try:
                return call(request, timeout=10)
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise RuntimeError(error.details()) from error
                self.refused += 1
                time.sleep(0.02)
        raise TimeoutError("the connector did not come back")


def _create_request(window: Window) -> CreateTaskRequest:
    from collections import OrderedDict

    from flytekit.configuration import ImageConfig, SerializationSettings
    from flytekit.tools.translator import get_serializable

    from tasks.sensors.kafka_window import kafka_window

    context = FlyteContextManager.current_context()
    settings = SerializationSettings(ImageConfig.auto(), project="p", domain="d", version="v")
    template = get_serializable(OrderedDict(), settings, kafka_window).template
    inputs = TypeEngine.dict_to_literal_map(context, {"window": window}, {"window": Window})
    return CreateTaskRequest(template=template.to_flyte_idl(), inputs=inputs.to_flyte_idl(), output_prefix="/nowhere")


def _window(log: KafkaLog, bootstrap: str, topic: str, cuts: list[TakenCut], rng: random.Random) -> Window:
    """Open the next window where the last cut ended, as the chain would."""
    last = cuts[-1] if cuts else None
    bounds = {p: end for p, (_, end) in last.ranges.items()} if last else {}
    return Window(
        bootstrap=bootstrap,
        topic=topic,
        log_id=last.log_id if last else "",
        generation=0,
        offsets=bounds or {str(partition): 0 for partition in log.watermarks(topic)},
        last_offsets={},
        last_digests={},
        opened_at=time.time(),
        min_updates=rng.randint(1, 4),
        max_wait_s=rng.uniform(0.1, 0.6),
        max_bytes=rng.choice((None, 150)),
        max_updates=rng.randint(2, 6),
    )


def _gaps(cuts: list[TakenCut], ends: dict[str, int]) -> Iterator[str]:
    """Name every place where the cuts, in their order, do not tile the log from its beginning to its end."""
    at = dict.fromkeys(ends, 0)
    for cut in cuts:
        for partition, (start, end) in cut.ranges.items():
            if start != at[partition]:
                yield f"{partition}: {at[partition]} to {start}"
            at[partition] = end
    yield from (f"{p}: {at[p]} to {end}" for p, end in ends.items() if at[p] != end)


def _digest(log: KafkaLog, cut: TakenCut) -> str:
    return records_digest(log.read(cut.topic, {int(p): (start, end) for p, (start, end) in cut.ranges.items()}))


def _total(log: KafkaLog, topic: str) -> int:
    return sum(high for _, high in log.watermarks(topic).values())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the trigger did not finish")
        time.sleep(0.05)


def describe(found: TriggerKills | SensorKills) -> dict:
    """Return the numbers without the long lists."""
    return {name: value if isinstance(value, int) else len(value) for name, value in asdict(found).items()}

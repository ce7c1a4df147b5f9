"""Sensors: the window logic over a log, the two sensor tasks in a local run, and what a bad broker gets."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from flyteidl.core.execution_pb2 import TaskExecution
from flytekit import FlyteContextManager, workflow
from flytekit.configuration import ImageConfig, SerializationSettings
from flytekit.core.type_engine import TypeEngine
from flytekit.exceptions.user import FlyteUserException
from flytekit.sensor.base_sensor import SensorMetadata
from flytekit.sensor.sensor_engine import SensorEngine
from flytekit.tools.translator import get_serializable
from flytekit.types.file import FlyteFile

from fednested_lib.envelope import HEADER, make_envelope
from fednested_lib.errors import LogError
from fednested_lib.log import UPDATES, InMemoryLog
from fednested_lib.signing import Signer
from services.gates import answer_gates
from tasks.aggregation import keep_cut, open_window, take_cut
from tasks.federation import ConfigFile
from tasks.sensors.kafka_backlog import kafka_backlog
from tasks.sensors.kafka_window import KafkaWindowConnector, WindowMeta, kafka_window
from tests.federation import Device, make_workspace
from tier1.federation import open_federation
from tier1.loops.aggregate_experts import fold_updates
from tier1.loops.records import CutRef, Window
from tier1.loops.window import closed_by, cut_window, look
from tier1.versions.cut import read_cut
from tier1.versions.manifest import Cut
from workflows.sensed_round import sensed_round


def window(**changes: object) -> Window:
    fields = {
        "bootstrap": "memory:sensors",
        "topic": UPDATES,
        "log_id": "",
        "generation": 0,
        "offsets": {"0": 0, "1": 0, "2": 0},
        "last_offsets": {},
        "last_digests": {},
        "opened_at": 1000.0,
        "min_updates": 3,
        "max_wait_s": 60.0,
        "max_bytes": None,
        "max_updates": 10,
    }
    return Window(**{**fields, **changes})


@pytest.fixture
def log() -> InMemoryLog:
    log = InMemoryLog(name="here")
    log.create_topics({UPDATES: 3})
    return log


def send(log: InMemoryLog, n: int, size: int = 10) -> None:
    for index in range(n):
        log.append(UPDATES, key=b"%d" % index, value=b"x" * size, headers={})


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ((3, 0, 0.0), "updates"),
        ((2, 500, 0.0), "bytes"),
        ((2, 499, 59.9), ""),
        ((0, 0, 60.0), "time"),
        ((3, 500, 60.0), "updates"),
    ],
)
def test_whichever_bound_is_first_closes_the_window(seen: tuple[int, int, float], expected: str) -> None:
    """K updates, B bytes or T seconds, each exactly at its bound."""
    n_updates, n_bytes, waited_s = seen
    assert closed_by(window(max_bytes=500), n_updates=n_updates, n_bytes=n_bytes, waited_s=waited_s) == expected


def test_bytes_count_only_where_they_are_bounded(log: InMemoryLog) -> None:
    """Without B nothing is read to look; with it the records since the offsets count, those before them do not."""
    send(log, 2, size=100)
    before = {str(partition): high for partition, (_, high) in log.watermarks(UPDATES).items()}
    send(log, 1, size=50)
    assert look(log, window(min_updates=9), now=1000).n_bytes == 0
    assert look(log, window(min_updates=9, max_bytes=1000), now=1000).n_bytes == 2 * 101 + 51
    assert look(log, window(min_updates=9, max_bytes=51, offsets=before), now=1000).closed_by == "bytes"


def test_a_payload_in_the_blob_store_counts_with_what_its_envelope_declares(log: InMemoryLog) -> None:
    """Large payloads are claim checks with an empty value; a header that cannot be parsed counts as itself."""
    digest = "a" * 64
    envelope = make_envelope(
        Signer.from_seed(bytes(32)),
        federation="f",
        client_id="ann",
        key_epoch=0,
        sequence=0,
        base_version=0,
        base_digest=digest,
        adapter={"rank": 1, "alpha": 1.0},
        expert_ids={"0": [0]},
        tokens={"0": [1]},
        num_examples=1,
        encoding="int8",
        payload_sha256=digest,
        payload_bytes=1 << 20,
        payload_uri=f"blob:{digest}",
    ).to_bytes()
    log.append(UPDATES, key=b"ann", value=b"", headers={HEADER: envelope})
    log.append(UPDATES, key=b"bob", value=b"", headers={HEADER: b"{}"})
    records = 2 * (len(b"ann") + len(HEADER)) + len(envelope) + len(b"{}")
    assert look(log, window(min_updates=9, max_bytes=1 << 30), now=1000).n_bytes == records + (1 << 20)
    assert look(log, window(min_updates=9, max_bytes=1 << 20), now=1000).closed_by == "bytes"


def test_a_cut_is_what_the_chain_would_have_cut(log: InMemoryLog) -> None:
    """The sensor's cut names the log, the ranges and the digest that the fold will check, and starts at the offsets."""
    send(log, 5)
    seen = look(log, window(), now=1000)
    taken = cut_window(log, seen)
    assert (taken.n_records, taken.closed_by, taken.log_id) == (5, "updates", log.identity(UPDATES))
    fields = {name: value for name, value in asdict(taken).items() if name != "closed_by"}
    cut = Cut(**{**fields, "ranges": {p: tuple(bounds) for p, bounds in taken.ranges.items()}})
    assert len(read_cut(log, cut)) == 5
    again = window(log_id=taken.log_id, offsets={p: end for p, (_, end) in taken.ranges.items()})
    assert look(log, again, now=1000).n_updates == 0


def test_a_log_that_went_backwards_or_was_replaced_is_named(log: InMemoryLog) -> None:
    """A window over a log that lost what was consumed stops with what is missing, before any time-out."""
    send(log, 1)
    with pytest.raises(LogError, match="ends at offset"):
        look(log, window(offsets={"0": 9, "1": 9, "2": 9}), now=1000)
    with pytest.raises(LogError, match="connect the log that the chain has consumed"):
        cut_window(log, look(log, window(log_id="another", min_updates=1), now=1000))


def test_an_empty_window_says_value_bound_and_remedy(log: InMemoryLog) -> None:
    """Nothing in T seconds is a result, a cut of no records, and its message helps."""
    seen = look(log, window(), now=1061)
    assert cut_window(log, seen).n_records == 0
    assert str(seen) == (
        "0 of 3 updates, 61 of 60 s: nothing arrived; see that devices run and send, or raise window.max_wait_s"
    )


def test_all_state_is_in_the_resource_meta() -> None:
    """What propeller hands back to a restarted connector is the whole window."""
    meta = WindowMeta(window=window(max_bytes=7), trouble="no broker")
    assert WindowMeta.decode(meta.encode()) == meta


@pytest.fixture
def config(tmp_path: Path) -> FlyteFile:
    return FlyteFile(str(make_workspace(tmp_path, window={"min_updates": 2, "max_wait_s": 30.0})))


def test_a_sensed_round_folds_what_closed_the_window(config: FlyteFile) -> None:
    """The workflow waits for two updates, folds exactly these, asks, and publishes: a local run from end to end."""
    fed = open_federation(config.path)
    open_window(config=config)  # genesis
    for client in ("ann", "bob"):
        Device(fed, client).send()
    with answer_gates(lambda: "approve"):
        outcome, published = sensed_round(config=config)
    assert (outcome.verdict, outcome.version, published.version) == ("approved", 1, 1)
    assert sum(open_federation(config.path).chain.state().offsets.values()) == 2


@workflow
def by_backlog(config: ConfigFile) -> CutRef:
    ready = kafka_backlog(window=open_window(config=config))
    cut = take_cut(config=config)
    ready >> cut
    return cut


def test_the_plain_sensor_waits_and_the_cut_is_taken_after_it(config: FlyteFile) -> None:
    """`BaseSensor` returns nothing; the records that closed its window are in the cut that is taken next."""
    fed = open_federation(config.path)
    open_window(config=config)
    for client in ("ann", "bob"):
        Device(fed, client).send()
    assert by_backlog(config=config).n_records == 2


def test_the_sensor_engine_may_restart_between_two_looks(config: FlyteFile) -> None:
    """Flyte's own engine, over the bytes of its meta, as its connector service does it: open, then closed."""
    opened = open_window(config=config)
    context = FlyteContextManager.current_context()
    settings = SerializationSettings(ImageConfig.auto())
    template = get_serializable(OrderedDict(), settings, kafka_backlog).template
    inputs = TypeEngine.dict_to_literal_map(context, {"window": opened}, {"window": Window})
    meta = asyncio.run(SensorEngine().create(task_template=template, inputs=inputs)).encode()

    def phase() -> int:
        return asyncio.run(SensorEngine().get(resource_meta=SensorMetadata.decode(meta))).phase

    assert phase() == TaskExecution.RUNNING
    for client in ("ann", "bob"):
        Device(open_federation(config.path), client).send()
    assert phase() == TaskExecution.SUCCEEDED


def test_a_cut_that_another_loop_was_faster_with_comes_back_empty(config: FlyteFile) -> None:
    """Two loops on the same updates: the later keeps nothing, folds nothing, and fails nothing."""
    fed = open_federation(config.path)
    open_window(config=config)
    for client in ("ann", "bob"):
        Device(fed, client).send()
    taken = kafka_window(window=open_window(config=config))
    assert keep_cut(config=config, taken=replace(taken, generation=1)).path == ""  # of a log that was given up
    kept = keep_cut(config=config, taken=taken)
    assert fold_updates(fed, kept).n_accepted == 2
    with answer_gates(lambda: "approve"):
        sensed_round(config=config)
    stale = keep_cut(config=config, taken=taken)
    assert (stale.n_records, stale.path) == (0, "")
    assert fold_updates(fed, stale).digest == ""


def test_a_broker_that_is_not_there_is_one_line() -> None:
    """At the start it fails at once; in the middle it is waited for, and after T it is worth another attempt."""
    nowhere = window(bootstrap="127.0.0.1:1", opened_at=time.time())
    with pytest.raises(
        FlyteUserException, match=r"with error: update log 127\.0\.0\.1:1 [^\n]*start the broker[^\n]*$"
    ):
        kafka_window(window=nowhere)
    resource = KafkaWindowConnector().get(WindowMeta(window=nowhere))
    assert resource.phase == TaskExecution.RUNNING
    resource = KafkaWindowConnector().get(WindowMeta(window=replace(nowhere, opened_at=0.0)))
    assert resource.phase == TaskExecution.RETRYABLE_FAILED
    assert "127.0.0.1:1" in resource.message
    assert "\n" not in resource.message


def test_a_topic_that_does_not_exist_names_the_command() -> None:
    """A broker without our topics gets the remedy instead of an empty cut."""
    with pytest.raises(FlyteUserException, match=r"topic updates\.experts\.local does not exist.*bootstrap-topics"):
        kafka_window(window=window(bootstrap="memory:bare"))


def test_a_log_that_lost_offsets_fails_the_task(config: FlyteFile) -> None:
    """Nobody's retry helps: the task fails with the log's line."""
    opened = open_window(config=config)
    with pytest.raises(FlyteUserException, match="ends at offset 0, but the chain has consumed up to 9"):
        kafka_window(window=replace(opened, offsets={"0": 9, "1": 9, "2": 9}))

"""The data engine: statistics by hand, hysteresis, budget, hostile telemetry, noise, kills between durable steps."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fednested_lib.errors import ConfigError, EnvelopeError, StorageError, TransportError
from fednested_lib.events import MAX_EXPERTS, TrainingTask, TrainingTelemetry, parse_event, sign_event, verify_event
from fednested_lib.log import TASKS, TELEMETRY
from fednested_lib.signing import Signer
from services.trigger.launch import ROUTES, order_of
from tests.federation import SMALL_MODEL, device_key, make_workspace
from tests.tier1.loops.telemetry_noise import false_alarms
from tier1.commands import app as tier1_app
from tier1.config import DataEngineConfig, load_tier1
from tier1.federation import Federation, open_federation
from tier1.loops.data_engine import findings_html, load_state, turn_engine
from tier1.loops.findings import Asked, Open, decide
from tier1.loops.fleet_statistics import Device, Heard, Measurement, measure
from tier1.loops.genesis import ensure_genesis
from tier1.loops.records import MAX_FINDINGS

ROOT = Path(__file__).resolve().parents[3]
HOUR, DAY = 3600.0, 86_400.0
FIVE = tuple(f"d{number}" for number in range(5))
REGIONS = {"d0": "north", "d1": "north", "d2": "north", "d3": "south", "d4": "south", "d5": "south"}
SETTINGS = DataEngineConfig(window_s=2 * HOUR, reference_s=48 * HOUR, min_devices=3)


def heard(at: float, loss: float, change: float = -0.1, records: int = 1) -> Heard:
    return Heard(at=at, loss_first=loss, loss_change=change, records=records)


def device(*rows: Heard, region: str = "north", device_class: str = "car", **expert_tokens: dict[str, int]) -> Device:
    tokens = {layer.removeprefix("l"): counts for layer, counts in expert_tokens.items()}
    return Device(region=region, device_class=device_class, rows=rows, expert_tokens=tokens)


def values(fleet: list[Device], min_devices: int = 1) -> dict[str, tuple[float, int, int]]:
    found = measure(fleet, now=10.0, window_s=5.0, min_devices=min_devices)
    return {each.key: (round(each.value, 9), each.devices, each.records) for each in found}


# statistics -----------------------------------------------------------------------------------------------------------


def test_drift_is_the_median_change_over_a_regions_devices() -> None:
    """By hand: changes 3−2 = 1, 2.5−2 = 0.5 and median(4, 5, 9)−median(1, 3) = 3 have median 1; 5 recent records."""
    fleet = [
        device(heard(1, 2.0), heard(9, 3.0)),
        device(heard(1, 2.0), heard(9, 2.5)),
        device(heard(1, 1.0), heard(5, 3.0), heard(6, 4.0), heard(7, 5.0), heard(9, 9.0)),
        device(heard(9, 99.0)),  # without a reference it says nothing
        device(heard(1, 2.0), heard(9, 2.0), region="south"),
    ]
    found = values(fleet)
    assert found["drift.north"] == (1.0, 3, 5)
    assert found["drift.south"] == (0.0, 1, 1)


def test_failing_and_drop_out_are_shares_of_devices() -> None:
    """By hand: of three cars heard in the window one got worse; of four heard before it two are silent."""
    fleet = [
        device(heard(1, 2.0), heard(9, 2.0, change=0.1)),
        device(heard(1, 2.0), heard(9, 2.0)),
        device(heard(9, 2.0)),
        device(heard(1, 2.0)),
        device(heard(1, 2.0, records=4)),
    ]
    found = values(fleet)
    assert found["failing.car"] == (round(1 / 3, 9), 3, 3)
    assert found["drop_out.north"] == (0.5, 4, 7)


def test_loads_are_tokens_over_the_even_share() -> None:
    """By hand: 30, 10, 0, 0 of 40 tokens on 4 experts are loads 3, 1, 0, 0; the median of 3, 2 and 4 is 3."""
    now = heard(9, 2.0)
    fleet = [
        device(now, l0={"0": 30, "1": 10, "2": 0, "3": 0}),
        device(now, l0={"0": 20, "1": 20, "2": 0, "3": 0}),
        device(now, l0={"0": 40, "1": 0, "2": 0, "3": 0}),
        device(now, l0={"0": 0, "1": 0}),  # no token at all says nothing
        device(heard(1, 2.0), l0={"0": 0, "1": 9}),  # too old
    ]
    found = values(fleet)
    assert found["saturated.l0.e0"] == (3.0, 3, 3)
    assert found["starving.l0.e0"] == (-2.0, 3, 3)
    assert found["starving.l0.e1"] == (0.0, 3, 3)
    assert found["starving.l0.e3"] == (1.0, 3, 3)


@pytest.mark.parametrize(("honest", "found"), [(3, True), (4, False)])
def test_an_expert_that_fewer_than_half_name_is_unknown(honest: int, found: bool) -> None:
    """By hand: three that name expert 9 are half of six devices telling of its layer, and fewer than half of seven."""
    now = heard(9, 2.0)
    fleet = [device(now, l0={"0": 9, "9": 0}) for _ in range(3)] + [device(now, l0={"0": 9}) for _ in range(honest)]
    fleet.append(device(now, l1={"0": 9}))  # tells nothing about layer 0
    assert ("starving.l0.e9" in values(fleet, min_devices=3)) == found


def test_few_devices_are_no_evidence() -> None:
    """Below the least number of devices nothing is said, whatever the value."""
    fleet = [device(heard(1, 2.0), heard(9, 9.0)) for _ in range(2)]
    assert values(fleet, min_devices=3) == {}


# hysteresis and budget ------------------------------------------------------------------------------------------------


class Engine:
    """`decide` over many turns, with what it remembers."""

    def __init__(self, **changes: object):
        self.settings = SETTINGS.model_copy(update=changes)
        self.opened: dict[str, Open] = {}
        self.asked: list[Asked] = []

    def turn(self, now: float, **found: float):
        measured = [
            Measurement(kind="drift", subject=subject, value=value, devices=5, records=9)
            for subject, value in found.items()
        ]
        decision = decide(measured, self.opened, self.asked, now=now, settings=self.settings, federation="f")
        self.opened, self.asked = decision.opened, decision.asked
        return decision


def test_a_finding_is_open_between_its_two_bounds() -> None:
    """Raised at 0.2, open at 0.15 and 0.1, cleared below, and 0.15 again raises nothing; one task in all."""
    engine = Engine()
    turns = [engine.turn(hour * HOUR, north=value) for hour, value in enumerate((0.19, 0.2, 0.15, 0.1, 0.09, 0.15))]
    assert [[each.status for each in turn.findings] for turn in turns] == [
        [],
        ["raised"],
        ["open"],
        ["open"],
        ["cleared"],
        [],
    ]
    assert [len(turn.tasks) for turn in turns] == [0, 1, 0, 0, 0, 0]
    assert turns[3].findings[0].opened_at == HOUR
    assert [turn.findings[0].why_no_task for turn in turns[1:5]] == ["", "cooldown", "cooldown", "cleared"]


def test_an_open_finding_asks_again_after_the_cooldown_only() -> None:
    """Thirty hourly turns of one open finding with a cooldown of a day: tasks at hours 0 and 24, under two names."""
    engine = Engine()
    tasks = [task for hour in range(30) for task in engine.turn(hour * HOUR, north=1.0).tasks]
    assert [task.task_id for task in tasks] == ["drift.north.19700101t000000", "drift.north.19700102t000000"]


def test_a_value_that_swings_through_both_bounds_does_not_ask_at_every_swing() -> None:
    """Raised and cleared every hour: the cooldown outlives the finding."""
    engine = Engine()
    asked = [len(engine.turn(hour * HOUR, north=1.0 if hour % 2 == 0 else 0.0).tasks) for hour in range(24)]
    assert sum(asked) == 1


def test_what_nobody_can_measure_stays_open_and_is_forgotten_at_last() -> None:
    """Silence is no recovery; after the time for which rows are kept there is nothing left to speak of."""
    engine = Engine()
    engine.turn(0.0, north=1.0)
    engine.turn(47 * HOUR)
    assert "drift.north" in engine.opened
    engine.turn(48 * HOUR)
    assert engine.opened == {}


def test_one_task_answers_all_findings_of_a_turn_that_want_the_same_loop() -> None:
    """Three regions drift: one core update, explained by the worst with its numbers, and all three cool down."""
    engine = Engine()
    decision = engine.turn(0.0, north=0.3, south=0.9, west=0.4)
    (task,) = decision.tasks
    assert task.kind == "core_update"
    assert task.reason.model_dump() == {
        "finding": "drift",
        "subject": "south",
        "value": 0.9,
        "bound": 0.2,
        "window_s": 7200.0,
        "devices": 5,
        "records": 9,
        "others": 2,
    }
    assert {each.task_id for each in decision.findings} == {task.task_id}
    assert engine.turn(HOUR, north=0.3, south=0.9, west=0.4).tasks == []


def test_a_day_has_room_for_so_many_tasks() -> None:
    """With two a day, the third region's finding waits with the reason and asks when the first task is a day old."""
    engine = Engine(tasks_per_day=2)
    assert [len(engine.turn(0.0, a=1.0).tasks), len(engine.turn(HOUR, a=1.0, b=1.0).tasks)] == [1, 1]
    third = engine.turn(2 * HOUR, a=1.0, b=1.0, c=1.0)
    assert (third.tasks, {each.subject: each.why_no_task for each in third.findings}["c"]) == ([], "budget")
    (task,) = engine.turn(DAY, b=1.0, c=1.0).tasks
    assert task.reason.subject == "c"


def test_a_finding_without_a_loop_is_told_and_asks_nothing() -> None:
    """Drop-out is nothing that training mends: by default it is only reported."""
    measured = [Measurement(kind="drop_out", subject="north", value=1.0, devices=5, records=9)]
    decision = decide(measured, {}, [], now=0.0, settings=SETTINGS, federation="f")
    assert (decision.tasks, [each.why_no_task for each in decision.findings]) == ([], ["no_loop"])


@pytest.mark.parametrize(
    "values",
    [
        {"drift": {"raise_at": 0.1, "clear_at": 0.1}},
        {"failing": {"raise_at": 0.33}},
        {"min_devices": 2},
        {"window_s": 7200.0, "reference_s": 7200.0},
        {"drift": {"raise_at": float("inf")}},
        {"drift": {"task": "make_coffee"}},
    ],
)
def test_settings_that_would_not_hold_are_refused(tmp_path: Path, values: dict) -> None:
    """No hysteresis, a share that one device of three reaches, windows that overlap: one line with the key."""
    with pytest.raises(ConfigError, match=f"data_engine.*{'' if len(values) > 1 else next(iter(values))}"):
        load_tier1(make_workspace(tmp_path, data_engine=values))


# one turn over a log --------------------------------------------------------------------------------------------------


class Fleet:
    """Devices that tell what a test says; sequence numbers rise by themselves."""

    def __init__(self, fed: Federation):
        self.fed, self.numbers = fed, itertools.count()

    def tell(self, client: str, loss: float, *, change: float = -0.1, signer: Signer | None = None, **changes) -> None:
        fields = {
            "federation": self.fed.config.federation,
            "client_id": client,
            "sequence": next(self.numbers),
            "base_version": 0,
            "loss_first": loss,
            "loss_last": loss + change,
            "tokens": 100,
            "seconds": 1.0,
            "payload_bytes": 100,
            **changes,
        }
        event = TrainingTelemetry(**fields)
        headers = sign_event(event, signer or device_key(client))
        self.fed.log.append(TELEMETRY, key=client.encode(), value=event.to_bytes(), headers=headers)

    def tasks(self) -> list[TrainingTask]:
        """Return this federation's tasks, each verified under tier 1's key; other tests share the broker."""
        records = self.fed.log.read(TASKS, self.fed.log.watermarks(TASKS))
        ours = [each for each in records if parse_event(each.value).federation == self.fed.config.federation]
        return [verify_event(each.value, dict(each.headers), self.fed.signer.public_key) for each in ours]


def workspace(directory: Path, clients: tuple[str, ...] = FIVE, **options) -> Path:
    places = {client: {"region": REGIONS.get(client, "north")} for client in clients}
    devices = {client: {"public_key": device_key(client).public_key, **places[client]} for client in clients}
    settings = {"window_s": 2 * HOUR, "reference_s": 48 * HOUR, "min_devices": 3, **options.pop("data_engine", {})}
    return make_workspace(directory, clients=(), devices=devices, data_engine=settings, **options)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(open_federation(workspace(tmp_path)))


def told(fleet: Fleet, hour: float, *, north: float = 2.0, south: float = 2.0):
    """All devices tell their region's loss, and the engine turns."""
    for client in fleet.fed.config.devices:
        fleet.tell(client, north if REGIONS[client] == "north" else south)
    return turn_engine(fleet.fed, now=hour * HOUR)


def test_a_planted_drift_is_one_finding_and_one_task(fleet: Fleet) -> None:
    """North's loss rises by 0.3: one finding with the numbers, one signed task, none again while it is open."""
    reports = [told(fleet, hour) for hour in range(6)] + [told(fleet, hour, north=2.3) for hour in range(6, 12)]
    assert [len(report.findings) for report in reports[:7]] == [0] * 7  # at first old rows are half of the window
    finding = reports[7].findings[0]
    assert (finding.kind, finding.subject, finding.status, finding.devices) == ("drift", "north", "raised", 3)
    assert finding.value == pytest.approx(0.3)
    (task,) = fleet.tasks()
    assert (task.kind, task.task_id, task.reason.subject) == ("core_update", "drift.north.19700101t070000", "north")
    assert [report.tasks for report in reports[7:]] == [[task.task_id], [], [], [], []]
    assert "<td>drift</td><td>north</td>" in findings_html(reports[7])


def test_one_device_that_shouts_raises_nothing(fleet: Fleet) -> None:
    """A hundred records with absurd losses and expert counts from one device move no median and no share."""
    for hour in range(6):
        told(fleet, hour)
    for hour in range(6, 12):
        for _ in range(100):
            fleet.tell("d0", 1e5, change=1e5, expert_tokens={"0": {"0": 1 << 40, "1": 0}})
        assert told(fleet, hour).findings == []


def test_telemetry_that_nobody_may_count_is_ignored_with_the_reason(fleet: Fleet) -> None:
    """Unsigned, unknown, foreign, repeated and malformed records are counted by reason and move nothing."""
    fleet.tell("d0", 2.0, sequence=1000)
    fleet.tell("d0", 9.0, sequence=1000)
    fleet.tell("d1", 9.0, signer=device_key("d0"))
    fleet.tell("stranger", 9.0)
    fleet.tell("d2", 9.0, federation="other")
    fleet.tell("d2", 1e9)
    fleet.fed.log.append(TELEMETRY, key=b"d2", value=b"{}", headers={})
    report = turn_engine(fleet.fed, now=HOUR)
    reasons = ("bad_signature", "foreign_federation", "repeated", "unknown_client")
    assert report.ignored == {"bad_event": 2, **dict.fromkeys(reasons, 1)}
    assert (report.read, report.counted) == (7, 1)
    state = load_state(fleet.fed.home / "data-engine/state.json")
    assert {client: [row.loss_first for row in each.rows] for client, each in state.devices.items()} == {"d0": [2.0]}


def test_nothing_is_counted_twice_when_the_log_is_read_again(fleet: Fleet) -> None:
    """A turn reads on from its offset; after another log with the same records took its place, none counts again."""
    first = told(fleet, 1)
    assert (first.read, turn_engine(fleet.fed, now=2 * HOUR).read) == (5, 0)
    fleet.fed.log.name = "another"
    again = turn_engine(fleet.fed, now=3 * HOUR)
    assert (again.read, again.counted, again.ignored) == (5, 0, {"repeated": 5})


def test_a_new_key_begins_its_numbers_anew(tmp_path: Path) -> None:
    """After a new key epoch the device's first record counts, whatever number the old key had reached."""
    fleet = Fleet(open_federation(workspace(tmp_path)))
    fleet.tell("d0", 2.0, sequence=900)
    turn_engine(fleet.fed, now=HOUR)
    device = fleet.fed.config.devices["d0"].model_copy(update={"key_epoch": 1})
    config = fleet.fed.config.model_copy(update={"devices": fleet.fed.config.devices | {"d0": device}})
    renewed = Fleet(Federation(config=config))
    renewed.tell("d0", 2.0, sequence=0)
    assert turn_engine(renewed.fed, now=2 * HOUR).counted == 1


def test_a_clock_from_the_future_heals(fleet: Fleet) -> None:
    """Turns dated a century ahead, a task among them, hold neither window nor budget afterwards."""
    century = 876_600
    for hour in range(4):
        told(fleet, century + hour, north=2.0 if hour < 3 else 9.0)
    reports = [told(fleet, hour, north=2.0 if hour < 3 else 9.0) for hour in range(4)]
    assert [len(report.tasks) for report in reports] == [0, 0, 0, 1]
    assert len(fleet.tasks()) == 2


def test_drop_out_of_a_region_is_found(fleet: Fleet) -> None:
    """North goes silent: its finding is told once the window is over, and south's devices raise none."""
    for hour in range(4):
        told(fleet, hour)
    fleet.tell("d3", 2.0)
    fleet.tell("d4", 2.0)
    report = turn_engine(fleet.fed, now=6 * HOUR)
    assert [(each.kind, each.subject, each.value) for each in report.findings] == [("drop_out", "north", 1.0)]
    assert fleet.tasks() == []


def test_an_expert_that_starves_is_found(fleet: Fleet) -> None:
    """Every device's newest training gives expert 2 of layer 1 nothing: named, with its share."""
    ensure_genesis(fleet.fed)
    for client in FIVE:
        fleet.tell(client, 2.0, expert_tokens={"1": {"0": 64, "1": 64, "2": 0}})
    report = turn_engine(fleet.fed, now=HOUR)
    assert [(each.kind, each.subject, each.value) for each in report.findings] == [("starving", "l1.e2", 1.0)]


def test_experts_that_the_model_lacks_are_nobodys(fleet: Fleet) -> None:
    """Layer 2 and expert 4 are outside 2 layers of 4 experts: no finding, no byte of state, no share of load."""
    ensure_genesis(fleet.fed)
    for client in FIVE:
        fleet.tell(client, 2.0, expert_tokens={"1": {"3": 8, "4": 0, "9999": 1 << 40}, "2": {"0": 8, "1": 0}})
    assert turn_engine(fleet.fed, now=HOUR).findings == []
    state = load_state(fleet.fed.home / "data-engine/state.json")
    assert [each.expert_tokens for each in state.devices.values()] == [{"1": {"3": 8}}] * 5


def test_the_engine_needs_no_torch(tmp_path: Path) -> None:
    """It runs in the control image, which has neither torch nor transformers, and looks up the head's experts there."""
    config = workspace(tmp_path)
    ensure_genesis(open_federation(config))
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'safetensors', 'tokenizers']));"
        "from tier1.commands import app; app()"
    )
    command = [sys.executable, "-c", program, "data-engine", "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 findings" in done.stdout


def test_before_there_is_a_model_no_expert_is_known(fleet: Fleet) -> None:
    """Without a chain what is told about experts is nobody's word on anything."""
    for client in FIVE:
        fleet.tell(client, 2.0, expert_tokens={"1": {"0": 64, "1": 0}})
    assert turn_engine(fleet.fed, now=HOUR).findings == []


def test_a_report_is_bounded(tmp_path: Path) -> None:
    """Of 100 starving experts the report, which Flyte carries and logs keep, names the worst 64 and counts the rest."""
    model = {"family": "mixtral", "vocab_size": 300, "config": {**SMALL_MODEL, "num_local_experts": 104}}
    fleet = Fleet(open_federation(workspace(tmp_path, model=model)))
    ensure_genesis(fleet.fed)
    counts = {str(expert): 0 if expert >= 40 else 1 for expert in range(100)} | {
        str(expert): 10_000 for expert in range(100, 104)
    }
    for client in FIVE:
        fleet.tell(client, 2.0, expert_tokens={"0": counts})
    report = turn_engine(fleet.fed, now=HOUR)
    assert (len(report.findings), report.left_out) == (MAX_FINDINGS, 104 - MAX_FINDINGS)
    assert [each.kind for each in report.findings[:5]] == ["saturated"] * 4 + ["starving"]
    assert {each.subject for each in report.findings[4:]} >= {f"l0.e{expert}" for expert in range(40, 100)}
    assert report.tasks == ["saturated.l0.e100.19700101t010000"]
    assert "104 findings" in findings_html(report)
    assert "40 more" in findings_html(report)


def test_a_record_names_so_many_experts_in_all_layers_together(fleet: Fleet) -> None:
    """16,384 experts in two layers are read; one more is a bad event, though neither layer is too large."""
    half = {str(expert): 0 for expert in range(MAX_EXPERTS // 2)}
    fleet.tell("d0", 2.0, expert_tokens={"0": half, "1": half})
    (told,) = fleet.fed.log.read(TELEMETRY, fleet.fed.log.watermarks(TELEMETRY))
    more = told.value.replace(b'"1":{', b'"1":{"9999":0,')
    with pytest.raises(EnvelopeError, match="expert_tokens.*16385 experts"):
        parse_event(more)


def test_noise_raises_nothing() -> None:
    """Seeded: six devices that scatter by 0.2 nats and tell every hour raise no drift in 3,000 hours."""
    assert false_alarms(turns=3000, devices=6, spread=0.2, every=1, seed=1) == 0


def test_scarce_noise_raises_little() -> None:
    """Seeded: with one record of each device in a window at most 2 % of 3,000 hourly turns raise a drift."""
    assert false_alarms(turns=3000, devices=6, spread=0.2, every=6, seed=1) <= 60


# what survives --------------------------------------------------------------------------------------------------------


def test_a_decision_that_could_not_be_sent_is_sent_by_the_next_turn(fleet: Fleet) -> None:
    """The log goes away between deciding and sending: the next turn sends the same task and asks for no other."""
    for hour in range(6):
        told(fleet, hour)
    log = fleet.fed.log
    append = log.append

    def refuse(topic: str, **record: object):
        if topic == TASKS:
            raise TransportError("away")
        return append(topic, **record)

    log.append = refuse
    told(fleet, 6, north=2.3)
    with pytest.raises(TransportError, match="away"):
        told(fleet, 7, north=2.3)
    log.append = append
    assert told(fleet, 8, north=2.3).tasks == ["drift.north.19700101t070000"]
    assert [task.task_id for task in fleet.tasks()] == ["drift.north.19700101t070000"]


def test_a_second_engine_is_told_to_wait(fleet: Fleet) -> None:
    """Two turns at once would each decide without the other's budget."""
    import fcntl

    turn_engine(fleet.fed, now=HOUR)
    with open(fleet.fed.home / "data-engine/lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(StorageError, match="another turn"):
            turn_engine(fleet.fed, now=2 * HOUR)


def test_a_damaged_state_is_one_line(fleet: Fleet) -> None:
    """What this version does not write is named with the file and the remedy."""
    path = fleet.fed.home / "data-engine/state.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"log_id": 1}')
    with pytest.raises(StorageError, match=r"state.json is unusable.*move it away"):
        turn_engine(fleet.fed, now=HOUR)


def test_the_command_prints_one_line_per_finding(tmp_path: Path) -> None:
    """What `fednested tier1 data-engine` prints: the finding with its numbers and task, then what was read."""
    config = workspace(tmp_path)
    fleet = Fleet(open_federation(config))
    fleet.fed.log.create_topics({TASKS: 1})
    told(fleet, time.time() / HOUR - 5)
    for client in FIVE:
        fleet.tell(client, 2.5)
    result = CliRunner().invoke(tier1_app, ["data-engine", "--config", str(config)])
    *_events, first, last = result.stdout.splitlines()
    assert first.startswith(
        "drift north raised: 0.5, raised at 0.2, cleared below 0.1; 3 devices, 3 records in 7200 s;"
    )
    assert last == "1 findings from 5 of 5 new records; ignored: none"


def test_tasks_and_telemetry_of_older_releases_keep_their_bytes() -> None:
    """The trigger compares digests of tasks: one without a reason is written as before there were reasons."""
    old = b'{"event":"training_task","federation":"f","kind":"aggregate","task_id":"t"}'
    assert parse_event(old).to_bytes() == old
    telemetry = (
        b'{"base_version":0,"client_id":"a","event":"training","federation":"f","loss_first":2.0,"loss_last":1.0,'
        b'"payload_bytes":1,"seconds":1.0,"sequence":0,"tokens":1}'
    )
    assert parse_event(telemetry).to_bytes() == telemetry


KILLS = (
    "durable.before_rename:1",
    "data_engine.after_decision",
    "data_engine.after_request",
    "durable.before_rename:2",
)


@pytest.mark.parametrize("failpoint", KILLS)
def test_a_killed_turn_asks_for_one_task(tmp_path: Path, kafka_bootstrap: str, failpoint: str) -> None:
    """Killed between any two durable steps, on a real broker: the next turn finishes; one task id, the same bytes."""
    name = f"engine-{uuid.uuid4().hex[:12]}"
    config = workspace(tmp_path, bootstrap=kafka_bootstrap, identity={})
    text = config.read_text().replace("federation: fednested\n", f"federation: {name}\n")
    config.write_text(text)
    fleet = Fleet(open_federation(config))
    told(fleet, time.time() / HOUR - 5)
    for client in FIVE:
        fleet.tell(client, 2.5)
    killed = run_engine(config, FEDNESTED_FAILPOINT=failpoint)
    assert killed.returncode == -9, killed.stderr
    assert run_engine(config).returncode == 0
    tasks = fleet.tasks()
    assert {task.reason.subject for task in tasks} == {"north"}
    assert len({task.to_bytes() for task in tasks}) == len({order_of(task, ROUTES).name for task in tasks}) == 1
    fleet.fed.close()


def run_engine(config: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from tier1.commands import app; app()", "data-engine", "--config", str(config)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )

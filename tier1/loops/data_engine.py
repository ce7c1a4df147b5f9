"""The data engine: telemetry in, findings and training tasks out.

    telemetry.edge → one row per device and turn → statistics → findings → tasks.training

One turn is: send what an earlier turn decided and may not have sent; read from the remembered offset; decide; write it
all down; send; tick off. The decision is written before anything is sent, so a turn that is killed anywhere either
never was, or sends the same bytes again, of which the trigger launches one execution.

Telemetry is hints, not truth: nothing of it enters a version, a lost record costs a little evidence, and the offsets
lie in this engine's own file. Only registered devices' signatures count; region and class are tier 1's word, not a
device's.
"""

from __future__ import annotations

import fcntl
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fednested_lib.blobs import write_durable
from fednested_lib.envelope import ClientId
from fednested_lib.errors import EnvelopeError, StorageError
from fednested_lib.events import SIGNATURE_HEADER, TrainingTask, TrainingTelemetry, parse_event
from fednested_lib.failpoints import failpoint
from fednested_lib.log import TELEMETRY, Record, UpdateLog
from fednested_lib.partition import expert_param
from fednested_lib.signing import canonical_json, verify
from fednested_lib.snapshot import expert_shapes
from tier1.config import DeviceRecord
from tier1.federation import Federation
from tier1.loops.findings import Asked, Open, decide
from tier1.loops.fleet_statistics import Device, Heard, measure
from tier1.loops.records import MAX_FINDINGS, EngineReport, Finding

MAX_READ = 1_000_000  # records of one turn and partition, the newest
MAX_PER_TURN = 64  # records of one device that make its row of the turn, the newest
MAX_ROWS = 1024  # of one device: more than an hourly turn makes in a month
ELSEWHERE = "elsewhere"  # a device's of a region that somebody else listens to
MAX_LOSS = 1e6  # nats per token; more is no loss of a model

log = structlog.get_logger()


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Remembered(_State):
    """One device: the sequence number that it told about last, its rows, its newest tokens per expert of the head."""

    key_epoch: int
    sequence: int
    rows: list[Heard] = Field(default_factory=list)
    expert_tokens: dict[str, dict[str, int]] = Field(default_factory=dict)


class EngineState(_State):
    """All that the engine remembers between two turns, `data-engine/state.json` of the federation's home.

    `pending` are tasks that were decided on and may not have been sent.
    """

    log_id: str = ""
    offsets: dict[str, int] = Field(default_factory=dict)
    devices: dict[ClientId, Remembered] = Field(default_factory=dict)
    opened: dict[str, Open] = Field(default_factory=dict)
    asked: list[Asked] = Field(default_factory=list)
    pending: list[TrainingTask] = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Read:
    """What was new on the topic: the trusted events by device, and reason → records that do not count."""

    log_id: str
    offsets: dict[str, int]
    events: dict[ClientId, list[TrainingTelemetry]]
    counted: int
    ignored: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Span:
    """What of the topic is new: partition → [start, end), and the log that these offsets are of."""

    log_id: str
    ranges: dict[int, tuple[int, int]]


def turn_engine(
    fed: Federation, *, now: float, listen: Callable[[Federation, EngineState], Read] | None = None
) -> EngineReport:
    """Look once at the telemetry.

    Args:
        fed: the federation.
        now: seconds since the epoch.
        listen: reads what is new for a state; by default here and all of it.

    Raises:
        StorageError: the state cannot be read or written, or another turn runs.
        TransportError: the log does not answer; turn again, what was decided is sent then.
        LogError: records vanished while they were read; turn again.
        ChainError: the chain, which says what experts there are, is damaged.
    """
    with _alone(fed.home / "data-engine"):
        path = fed.home / "data-engine" / "state.json"
        left = load_state(path)
        state = _send_pending(fed, path, left)
        read = (listen or listen_here)(fed, state)
        new, findings = next_state(state, read, fed, now=now)
        _save(path, new)
        failpoint("data_engine.after_decision")
        _send_pending(fed, path, new)
    told = sorted(findings, key=lambda finding: -finding.value / finding.raise_at)[:MAX_FINDINGS]
    for finding in told:
        log.info("data_engine.finding", kind=finding.kind, subject=finding.subject, status=finding.status)
    return EngineReport(
        read=read.counted + sum(read.ignored.values()),
        counted=read.counted,
        ignored=read.ignored,
        findings=told,
        left_out=len(findings) - len(told),
        tasks=[task.task_id for task in (*left.pending, *new.pending)],
    )


def load_state(path: Path) -> EngineState:
    """Read the state; without a file the engine begins at the oldest telemetry.

    Raises:
        StorageError: the file cannot be read, or is not what this version writes.
    """
    try:
        return EngineState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return EngineState()
    except (OSError, ValidationError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not what this version writes"
        raise StorageError(
            f"state of the data engine {path} is unusable ({problem}): move it away; it begins anew at the oldest "
            "telemetry, and may ask once more for what it asked"
        ) from None


def listen_here(fed: Federation, state: EngineState) -> Read:
    """Read all that is new for a state of the engine."""
    return read_telemetry(fed.log, state, fed.config.devices, federation=fed.config.federation)


def read_telemetry(
    update_log: UpdateLog,
    state: EngineState,
    devices: Mapping[ClientId, DeviceRecord],
    *,
    federation: str,
    span: Span | None = None,
    region: str | None = None,
) -> Read:
    """Read what is new and keep what registered devices of this federation signed, each sequence number once.

    Args:
        update_log: has the topic.
        state: says what was counted before.
        devices: registered ones.
        federation: whose telemetry counts.
        span: what is new; by default where `state` ended until now.
        region: of the devices that are heard; of the others no signature is looked at. None: all of them.

    Raises:
        TransportError: the log does not answer.
        LogError: records vanished while they were read.
    """
    span = span or new_span(update_log, state)
    last = {client: _last_sequence(state.devices.get(client), device) for client, device in devices.items()}
    events: dict[ClientId, deque[TrainingTelemetry]] = {}
    verdicts: Counter[str] = Counter()
    for record in update_log.read(TELEMETRY, span.ranges):
        verdict, event = judge(record, devices, last, federation, region)
        verdicts[verdict] += 1
        if event is not None:
            last[event.client_id] = event.sequence
            events.setdefault(event.client_id, deque(maxlen=MAX_PER_TURN)).append(event)
    counted, _ = verdicts.pop("", 0), verdicts.pop(ELSEWHERE, 0)
    return Read(
        log_id=span.log_id,
        offsets={str(place): high for place, (_, high) in span.ranges.items()},
        events={client: list(told) for client, told in events.items()},
        counted=counted,
        ignored=dict(sorted(verdicts.items())),
    )


def new_span(update_log: UpdateLog, state: EngineState) -> Span:
    """Return what is new for a state; from another log, or one that ends before the remembered offset, it is all.

    What was counted before is not again, whatever is read twice.
    """
    log_id, ends = update_log.identity(TELEMETRY), update_log.watermarks(TELEMETRY)
    offsets = state.offsets if log_id == state.log_id else {}
    ranges = {place: (_start(offsets.get(str(place), low), low, high), high) for place, (low, high) in ends.items()}
    return Span(log_id=log_id, ranges=ranges)


def _last_sequence(old: Remembered | None, device: DeviceRecord) -> int:
    """Return the number that was counted last, -1 if none was under the device's present key."""
    return old.sequence if old is not None and old.key_epoch == device.key_epoch else -1


def _start(offset: int, low: int, high: int) -> int:
    return max(offset if offset <= high else low, low, high - MAX_READ)


def judge(
    record: Record,
    devices: Mapping[ClientId, DeviceRecord],
    last: Mapping[ClientId, int],
    federation: str,
    region: str | None = None,
) -> tuple[str, TrainingTelemetry | None]:
    """Return an empty reason and the event if a record counts, else why it does not, and None."""
    try:
        event = parse_event(record.value)
    except EnvelopeError as error:
        return error.reason, None
    if not isinstance(event, TrainingTelemetry) or max(abs(event.loss_first), abs(event.loss_last)) > MAX_LOSS:
        return "bad_event", None
    if event.federation != federation:
        return "foreign_federation", None
    if event.client_id not in devices:
        return "unknown_client", None
    if region not in (None, devices[event.client_id].region):
        return ELSEWHERE, None
    if event.sequence <= last[event.client_id]:
        return "repeated", None
    signature = dict(record.headers).get(SIGNATURE_HEADER, b"").decode("ascii", "replace")
    if not verify(devices[event.client_id].public_key, signature, record.value):
        return "bad_signature", None
    return "", event


def next_state(state: EngineState, read: Read, fed: Federation, *, now: float) -> tuple[EngineState, list[Finding]]:
    """Return what the engine remembers after a turn, its tasks still pending, and what it found."""
    settings, devices, experts = fed.config.data_engine, fed.config.devices, _experts(fed)
    memory = {
        client: _remember(
            state.devices.get(client), device, read.events.get(client, []), experts, now, settings.reference_s
        )
        for client, device in devices.items()
        if client in state.devices or client in read.events
    }
    measured = measure(_fleet(memory, devices), now=now, window_s=settings.window_s, min_devices=settings.min_devices)
    decision = decide(measured, state.opened, state.asked, now=now, settings=settings, federation=fed.config.federation)
    new = EngineState(
        log_id=read.log_id,
        offsets=read.offsets,
        devices=memory,
        opened=decision.opened,
        asked=decision.asked,
        pending=decision.tasks,
    )
    return new, decision.findings


def _experts(fed: Federation) -> dict[str, int]:
    """Return layer → number of experts of the head's model; nothing before there is one."""
    if not fed.chain.exists():
        return {}
    shapes = expert_shapes(fed.chain.state().head.snapshot)
    return {str(expert_param(name)[0]): n_experts for name, (n_experts, _, _) in shapes.items()}


def _remember(
    old: Remembered | None,
    device: DeviceRecord,
    told: list[TrainingTelemetry],
    experts: Mapping[str, int],
    now: float,
    reference_s: float,
) -> Remembered:
    """Add one row for what a device told in this turn; drop rows that are too old, and those of a clock set back."""
    rows = [row for row in old.rows if 0 <= now - row.at < reference_s] if old else []
    if not told:
        last = {"key_epoch": device.key_epoch, "sequence": _last_sequence(old, device)}
        return old.model_copy(update={"rows": rows, **last})
    row = Heard(
        at=now,
        loss_first=median(event.loss_first for event in told),
        loss_change=median(event.loss_last - event.loss_first for event in told),
        records=len(told),
    )
    return Remembered(
        key_epoch=device.key_epoch,
        sequence=told[-1].sequence,
        rows=[*rows, row][-MAX_ROWS:],
        expert_tokens=_known(told[-1].expert_tokens or {}, experts),
    )


def _known(told: Mapping[str, Mapping[str, int]], experts: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return the counts of experts that the model has: what a device makes up reaches neither state nor statistics."""
    return {
        layer: {expert: count for expert, count in tokens.items() if int(expert) < experts[layer]}
        for layer, tokens in told.items()
        if layer in experts
    }


def _fleet(memory: Mapping[ClientId, Remembered], devices: Mapping[ClientId, DeviceRecord]) -> Iterable[Device]:
    return (
        Device(
            region=devices[client].region,
            device_class=devices[client].device_class,
            rows=each.rows,
            expert_tokens=each.expert_tokens,
        )
        for client, each in memory.items()
    )


def _send_pending(fed: Federation, path: Path, state: EngineState) -> EngineState:
    """Send the tasks that were decided on, then tick them off; a crash between only repeats it."""
    if not state.pending:
        return state
    for task in state.pending:
        fed.request(task)
        log.info("data_engine.requested", task_id=task.task_id, loop=task.kind)
        failpoint("data_engine.after_request")
    state = state.model_copy(update={"pending": []})
    _save(path, state)
    return state


def _save(path: Path, state: EngineState) -> None:
    write_durable(path, canonical_json(state.model_dump(mode="json")))


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the engine's lock; two turns at once would each decide without the other's budget."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / "lock", "wb")  # noqa: SIM115 (held until the turn is over)
    except OSError as error:
        raise StorageError(
            f"{directory} cannot be opened ({error.strerror}): fix the path or its permissions"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(
                f"another turn of the data engine runs on {directory}: wait for it or stop it"
            ) from error
        yield


def findings_html(report: EngineReport) -> str:
    """Return the deck of one turn: the findings with their numbers, and what did not count."""
    rows = "".join(
        f"<tr><td>{escape(each.kind)}</td><td>{escape(each.subject)}</td><td>{each.status}</td><td>{each.value:.4g}</td>"
        f"<td>{each.raise_at:g}</td><td>{each.clear_at:g}</td><td>{each.devices}</td><td>{each.records}</td>"
        f"<td>{escape(each.task_id or each.why_no_task)}</td></tr>"
        for each in report.findings
    )
    heads = ("finding", "subject", "status", "value", "raised at", "cleared below", "devices", "records", "task")
    table = f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</table>"
    ignored = ", ".join(f"{count} {escape(reason)}" for reason, count in report.ignored.items()) or "none"
    more = f"<p>{report.left_out} more, none of them worse.</p>" if report.left_out else ""
    return (
        f"<h3>{len(report.findings) + report.left_out} findings, {len(report.tasks)} tasks</h3>"
        f"{table if rows else ''}{more}"
        f"<p>{report.counted} of {report.read} new records count; ignored: {ignored}.</p>"
    )

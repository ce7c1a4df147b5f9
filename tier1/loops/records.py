"""What one step of a loop hands to the next: small, frozen, typed; bytes stay in the stores."""

from __future__ import annotations

from dataclasses import dataclass

GATE = "secops-decision"  # Flyte's name of the signal that carries a person's decision
MAX_FINDINGS = 64  # of one report: Flyte bounds what a task returns, and an engine may find thousands


@dataclass(frozen=True, kw_only=True)
class TrainingGrant:
    """The policy allowed this run to train on these datasets."""

    decision_id: str
    datasets: list[str]


@dataclass(frozen=True, kw_only=True)
class PackedData:
    """Packed tokens of the governed datasets: int32 [n_rows, seq_len + 1] under `path`; [first, end) rows of each."""

    digest: str
    path: str
    n_rows: int
    n_tokens: int
    n_set_aside: int
    sources: dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class DenseRef:
    """The dense delta of one training run, published on `updates.tier1`."""

    update_id: str
    run_id: str
    base_version: int


@dataclass(frozen=True, kw_only=True)
class CutRef:
    """A cut of `updates.experts.local`, stored at `path`; `n_records` 0 means nothing arrived in time."""

    path: str
    n_records: int
    topic: str


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a sensor waits for on the device topic, and everything it needs to look: it holds no state of its own.

    Args:
        bootstrap: brokers of the update log; FEDNESTED_KAFKA_BOOTSTRAP of the sensor's process wins.
        topic: topic of device updates.
        log_id: identity of the log that the last cut was taken from; empty before the first cut.
        generation: how many times an operator accepted another log.
        offsets: partition → next offset to consume.
        last_offsets: partition → offset of the last consumed record.
        last_digests: partition → digest of that record, which shows a log that re-used offsets.
        opened_at: seconds since the epoch.
        min_updates: K; the window closes with so many updates,
        max_wait_s: T; or so many seconds after it was opened,
        max_bytes: B; or with so many bytes of records and declared payloads; None is off.
        max_updates: largest number of updates that one cut takes.
    """

    bootstrap: str
    topic: str
    log_id: str
    generation: int
    offsets: dict[str, int]
    last_offsets: dict[str, int]
    last_digests: dict[str, str]
    opened_at: float
    min_updates: int
    max_wait_s: float
    max_bytes: int | None
    max_updates: int


@dataclass(frozen=True, kw_only=True)
class TakenCut:
    """A cut as a sensor returns it: the fields of `tier1.versions.manifest.Cut`, and what closed the window.

    `closed_by` is `updates`, `bytes` or `time`; with `n_records` 0 nothing arrived in time.
    """

    topic: str
    log_id: str
    ranges: dict[str, list[int]]
    records_digest: str
    n_records: int
    generation: int
    closed_by: str


@dataclass(frozen=True, kw_only=True)
class CandidateRef:
    """A folded candidate; an empty digest means that there was nothing to fold."""

    digest: str
    parent_version: int
    n_accepted: int
    n_refused: int


@dataclass(frozen=True, kw_only=True)
class ShardFolded:
    """One shard of a planned fold is in the store: how many expert slices it has."""

    shard: int
    n_slices: int


@dataclass(frozen=True, kw_only=True)
class SuiteLoss:
    """Loss of a candidate's parent and of the candidate on one suite, nats per token; maybe not finite."""

    suite: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class SuitesMeasured:
    """What was measured of a candidate, and the suites whose measuring failed."""

    candidate: str
    losses: list[SuiteLoss]
    missing: list[str]


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What became of a candidate: `head` (entry `manifest`, number `version`), `rejected` or `nothing`."""

    status: str
    version: int
    manifest: str
    candidate: str
    tries: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was decided; `champion` is the version now.

    The verdict is `approved`, `rejected`, `gate_rejected`, `blocked` or `nothing`.
    """

    verdict: str
    version: int
    champion: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """The champion as devices can fetch it; `version` -1 means that there is no champion yet.

    `onnx` is the digest of the record of its ONNX graph, or why there is none; empty if none was asked for.
    """

    version: int
    snapshot: str
    n_blobs: int
    n_bytes: int
    onnx: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding after one turn.

    Args:
        kind: `drift`, `failing`, `drop_out`, `starving` or `saturated`.
        subject: region, device class, or expert as `l<layer>.e<expert>`.
        status: `raised`, `open` or `cleared`.
        value: of the statistic, in the unit of its kind.
        raise_at: the value that raises it.
        clear_at: it is open until the value is below.
        window_s: what was looked at.
        devices: that the value is taken over.
        records: behind the devices' rows.
        opened_at: when it was raised, seconds since the epoch.
        task_id: what this turn asked for about it; empty if nothing.
        why_no_task: `no_loop`, `cooldown`, `budget`, `cleared`; empty if a task was asked for.
    """

    kind: str
    subject: str
    status: str
    value: float
    raise_at: float
    clear_at: float
    window_s: float
    devices: int
    records: int
    opened_at: float
    task_id: str
    why_no_task: str

    def __str__(self) -> str:
        asked = f"task {self.task_id}" if self.task_id else f"no task ({self.why_no_task})"
        return (
            f"{self.kind} {self.subject} {self.status}: {self.value:.3g}, raised at {self.raise_at:g}, cleared below "
            f"{self.clear_at:g}; {self.devices} devices, {self.records} records in {self.window_s:g} s; {asked}"
        )


@dataclass(frozen=True, kw_only=True)
class RegionHeard:
    """The new telemetry of one region was read: its devices that told something, and their records that count."""

    region: str
    devices: int
    counted: int


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """One turn of the data engine.

    Args:
        read: records that were new.
        counted: those of them that count.
        ignored: reason → records that do not.
        findings: the worst first, at most `MAX_FINDINGS`.
        left_out: how many more findings there are, none of them worse.
        tasks: ids of the tasks that it sent.
    """

    read: int
    counted: int
    ignored: dict[str, int]
    findings: list[Finding]
    left_out: int
    tasks: list[str]

"""The data engine's look where devices are many: each region's telemetry is verified by itself, and one turn decides.

    plan_turn → hear_region for each region → collect_turn

What costs in a turn is a signature per record; a device's records depend on no other device's. So regions share the
work, and findings, budget and tasks are those of a turn in one piece. A region that nobody could hear is heard by who
collects, for a region that is left out would look like one whose devices are silent.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import structlog
from pydantic import ValidationError

from fednested_lib.blobs import write_durable
from fednested_lib.envelope import ClientId
from fednested_lib.errors import ConfigError
from fednested_lib.events import TrainingTelemetry
from fednested_lib.signing import canonical_json, sha256_hex
from tier1.federation import Federation
from tier1.loops.data_engine import (
    EngineState,
    Read,
    Span,
    _State,
    listen_here,
    load_state,
    new_span,
    read_telemetry,
    turn_engine,
)
from tier1.loops.records import EngineReport, RegionHeard

log = structlog.get_logger()
PER_RECORD = ("repeated", "bad_signature")  # counted by one region; everybody meets the other reasons


class Turn(_State):
    """A turn that is planned: the span of the topic that all regions read, and what the engine remembered then."""

    state: str
    log_id: str
    ranges: dict[str, tuple[int, int]]
    regions: list[str]

    def span(self) -> Span:
        """Return the span."""
        return Span(log_id=self.log_id, ranges={int(place): bounds for place, bounds in self.ranges.items()})


class Heard(_State):
    """What one region told."""

    events: dict[ClientId, list[TrainingTelemetry]]
    counted: int
    ignored: dict[str, int]


def plan_turn(fed: Federation) -> tuple[str, list[str]]:
    """Fix what is read, and return the turn's digest and the regions of the registered devices.

    Raises:
        StorageError: the engine's state cannot be read, or the plan not be written.
        TransportError: the log does not answer.
    """
    state = load_state(_home(fed) / "state.json")
    span, regions = new_span(fed.log, state), sorted({device.region for device in fed.config.devices.values()})
    ranges = {str(place): bounds for place, bounds in span.ranges.items()}
    turn = Turn(state=_fingerprint(state), log_id=span.log_id, ranges=ranges, regions=regions)
    data = canonical_json(turn.model_dump(mode="json"))
    write_durable(_directory(fed, sha256_hex(data)) / "turn.json", data)
    return sha256_hex(data), regions


def hear_region(fed: Federation, digest: str, region: str) -> RegionHeard:
    """Read and verify what the devices of one region told, and write it down for who collects.

    Raises:
        ConfigError: there is no such turn, or no such region in it.
        StorageError: the state cannot be read, or the result not be written.
        TransportError: the log does not answer.
        LogError: records vanished while they were read.
    """
    turn = _turn(fed, digest)
    if region not in turn.regions:
        raise ConfigError(f"region must be one of {', '.join(turn.regions)}, got {region}: plan another turn")
    heard = _heard(fed, digest, turn, region)
    return RegionHeard(region=region, devices=len(heard.events), counted=heard.counted)


def collect_turn(fed: Federation, digest: str, done: Iterable[RegionHeard | None], *, now: float) -> EngineReport:
    """Decide on what all regions told, as one turn of the engine; regions that are missing are heard here.

    After another turn of the engine the plan is void, and all is read anew.

    Args:
        fed: the federation.
        digest: of the planned turn.
        done: what the regions' readers said; None is one that failed.
        now: seconds since the epoch.

    Raises:
        StorageError, TransportError, LogError, ChainError: as a turn in one piece.
    """
    log.info("data_engine.collected", turn=digest, failed=sum(each is None for each in done))
    report = turn_engine(fed, now=now, listen=partial(_listen, digest=digest))
    shutil.rmtree(_home(fed) / "turns", ignore_errors=True)
    return report


def _listen(fed: Federation, state: EngineState, *, digest: str) -> Read:
    try:
        turn = _turn(fed, digest)
    except ConfigError:  # a second attempt, after the first one had decided
        return listen_here(fed, state)
    if turn.state != _fingerprint(state):
        log.info("data_engine.plan_void", turn=digest)
        return listen_here(fed, state)
    parts = [_heard(fed, digest, turn, region) for region in turn.regions]
    return _merged(turn, parts) if parts else listen_here(fed, state)


def _merged(turn: Turn, parts: list[Heard]) -> Read:
    ignored: Counter[str] = Counter(parts[0].ignored)
    for part in parts[1:]:
        ignored.update({reason: part.ignored.get(reason, 0) for reason in PER_RECORD})
    return Read(
        log_id=turn.log_id,
        offsets={place: high for place, (_, high) in turn.ranges.items()},
        events={client: told for part in parts for client, told in part.events.items()},
        counted=sum(part.counted for part in parts),
        ignored={reason: count for reason, count in sorted(ignored.items()) if count},
    )


def _heard(fed: Federation, digest: str, turn: Turn, region: str) -> Heard:
    """Return what a region told: as it was written down, or read now."""
    path = _directory(fed, digest) / f"region-{region}.json"
    try:
        return Heard.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        pass
    state, devices = load_state(_home(fed) / "state.json"), fed.config.devices
    federation = fed.config.federation
    read = read_telemetry(fed.log, state, devices, federation=federation, span=turn.span(), region=region)
    heard = Heard(events=read.events, counted=read.counted, ignored=read.ignored)
    write_durable(path, canonical_json(heard.model_dump(mode="json", exclude_none=True)))
    return heard


def _turn(fed: Federation, digest: str) -> Turn:
    path = _directory(fed, digest) / "turn.json"
    try:
        return Turn.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise ConfigError(f"turn {digest[:12]} at {path} cannot be read: run data_engine_regions again") from None


def _fingerprint(state: EngineState) -> str:
    """Return a digest of what listening depends on; tasks that wait to be sent do not matter."""
    return sha256_hex(canonical_json(state.model_copy(update={"pending": []}).model_dump(mode="json")))


def _directory(fed: Federation, digest: str) -> Path:
    return _home(fed) / "turns" / digest


def _home(fed: Federation) -> Path:
    return fed.home / "data-engine"

"""Windowed statistics over what devices tell: pure functions from devices to measurements.

    t ∈ window  ⇔  now − window_s < t ≤ now        t ∈ reference  ⇔  t before that
    drift       region        median_d ( median loss in the window − median loss in the reference )
    failing     device class  share of d whose median (loss after − loss before training) in the window is above 0
    drop_out    region        share of the d of the reference that are silent in the window
    starving    expert        1 − median_d load,   load_d = tokens_d · experts_d / Σ tokens_d   (1 is an even share)
    saturated   expert        median_d load

Every device has one voice, whatever and however often it speaks: a median or a share over d. Fewer than half of the
devices, saying anything at all, move a median no further than to a value of the others (Huber, *Robust Statistics*,
1981: breakdown point 1/2). A device speaks of an expert if it names it, and an expert of which fewer than half of those
speak that tell of its layer is unknown. In every kind larger is worse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

Kind = Literal["drift", "failing", "drop_out", "starving", "saturated"]
KINDS: tuple[Kind, ...] = ("drift", "failing", "drop_out", "starving", "saturated")


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What one device told between two turns of the engine, as one row.

    Args:
        at: seconds since the epoch, by the engine's clock.
        loss_first: median loss before training, nats per token.
        loss_change: median of loss after − loss before training.
        records: number of records behind it.
    """

    at: float
    loss_first: float
    loss_change: float
    records: int


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device: where it counts, its rows from old to new, and layer → expert → tokens of its newest training."""

    region: str
    device_class: str
    rows: Sequence[Heard]
    expert_tokens: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A statistic of one kind about one subject, and the evidence behind it."""

    kind: Kind
    subject: str
    value: float
    devices: int
    records: int

    @property
    def key(self) -> str:
        """Name of the finding that this may become."""
        return f"{self.kind}.{self.subject}"


def measure(devices: Iterable[Device], *, now: float, window_s: float, min_devices: int) -> list[Measurement]:
    """Return every statistic for which at least `min_devices` devices speak, by kind and subject.

    Args:
        devices: the fleet.
        now: seconds since the epoch; ends the window.
        window_s: length of the window.
        min_devices: least number of devices.
    """
    fleet, since = list(devices), now - window_s
    found = [
        *_by(fleet, lambda device: device.region, lambda group: _drift(group, since)),
        *_by(fleet, lambda device: device.device_class, lambda group: _failing(group, since)),
        *_by(fleet, lambda device: device.region, lambda group: _drop_out(group, since)),
        *_loads(fleet, since),
    ]
    return sorted(
        (each for each in found if each.devices >= min_devices), key=lambda each: (KINDS.index(each.kind), each.subject)
    )


def _by(
    fleet: list[Device],
    place: Callable[[Device], str],
    statistic: Callable[[list[Device]], tuple[Kind, float, int, int] | None],
) -> Iterator[Measurement]:
    groups: dict[str, list[Device]] = {}
    for device in fleet:
        groups.setdefault(place(device), []).append(device)
    for subject, group in groups.items():
        if (found := statistic(group)) is not None:
            kind, value, devices, records = found
            yield Measurement(kind=kind, subject=subject, value=value, devices=devices, records=records)


def _drift(group: list[Device], since: float) -> tuple[Kind, float, int, int] | None:
    pairs = [(recent, old) for recent, old in (_split(device, since) for device in group) if recent and old]
    if not pairs:
        return None
    changes = [_median_loss(recent) - _median_loss(old) for recent, old in pairs]
    return "drift", median(changes), len(pairs), sum(_records(recent) for recent, _ in pairs)


def _failing(group: list[Device], since: float) -> tuple[Kind, float, int, int] | None:
    heard = [recent for recent, _ in (_split(device, since) for device in group) if recent]
    if not heard:
        return None
    worse = [median(row.loss_change for row in rows) > 0 for rows in heard]
    return "failing", sum(worse) / len(heard), len(heard), sum(map(_records, heard))


def _drop_out(group: list[Device], since: float) -> tuple[Kind, float, int, int] | None:
    known = [(recent, old) for recent, old in (_split(device, since) for device in group) if old]
    if not known:
        return None
    silent = [not recent for recent, _ in known]
    return "drop_out", sum(silent) / len(known), len(known), sum(_records(old) for _, old in known)


def _loads(fleet: list[Device], since: float) -> Iterator[Measurement]:
    """Yield the loads of the experts that at least half of the devices name which tell of their layer."""
    loads: dict[tuple[str, str], list[float]] = {}
    tellers: Counter[str] = Counter()
    for device in fleet:
        if device.rows and device.rows[-1].at > since:
            for layer, tokens in device.expert_tokens.items():
                if total := sum(tokens.values()):
                    tellers[layer] += 1
                    for expert, count in tokens.items():
                        loads.setdefault((layer, expert), []).append(count * len(tokens) / total)
    for (layer, expert), values in loads.items():
        if 2 * len(values) >= tellers[layer]:
            yield from _extremes(f"l{layer}.e{expert}", median(values), len(values))


def _extremes(subject: str, load: float, n: int) -> Iterator[Measurement]:
    for kind, value in (("starving", 1 - load), ("saturated", load)):
        yield Measurement(kind=kind, subject=subject, value=value, devices=n, records=n)


def _split(device: Device, since: float) -> tuple[list[Heard], list[Heard]]:
    recent = [row for row in device.rows if row.at > since]
    return recent, list(device.rows[: len(device.rows) - len(recent)])


def _median_loss(rows: list[Heard]) -> float:
    return median(row.loss_first for row in rows)


def _records(rows: list[Heard]) -> int:
    return sum(row.records for row in rows)

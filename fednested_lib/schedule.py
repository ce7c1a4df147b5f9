"""When a device may train: on mains power, cool, idle, inside a time window, within its energy of the day.

    may train  ⟺  every bound that the configuration sets is met by what the device reads now

A bound whose reading this device does not have forbids training (`temperature_unknown`, …): who sets a bound wants it
kept. Reasons are words for a log and for `fednested tier2 doctor`, never values of a sensor.

Energy is time spent training times `energy.watts`, which the owner measures once (a plug-in meter, or the data sheet):
counters of the processor's own draw are missing on most devices and readable by root alone on the others. Seconds are
booked *before* they are spent, in slices, so that a killed trainer has booked too much, by one slice at most, and never
too little. Bytes per day are the policy's (`docs/sidecar.md`): the sidecar alone knows what left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from datetime import time as clock_time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from fednested_lib.config import ScheduleConfig
from fednested_lib.state import load_state, save_state

SLICE_S = 30.0  # of training that is booked at once
DAY = "%Y-%m-%d"


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What a device knows of itself; None where it has no such sensor.

    Args:
        on_mains: whether a mains supply is online.
        battery_percent: charge of the emptiest battery, 0 to 100.
        temperature_c: of the hottest thermal zone, in °C.
        load_per_core: load average of the last minute over the number of cores, the trainer's own share included.
    """

    on_mains: bool | None
    battery_percent: float | None
    temperature_c: float | None
    load_per_core: float | None


def read_device(sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> Readings:
    """Read the sensors of a Linux device; `sys` and `proc` are where those file systems are mounted."""
    supplies = [(_text(each / "type"), each) for each in sorted((sys / "class/power_supply").glob("*"))]
    mains = [_number(each / "online") for kind, each in supplies if kind in ("Mains", "USB")]
    batteries = [
        _number(each / "capacity") for kind, each in supplies if kind == "Battery" and _text(each / "scope") != "Device"
    ]
    known_mains = [each for each in mains if each is not None]
    zones = [_number(each) for each in sorted((sys / "class/thermal").glob("thermal_zone*/temp"))]
    degrees = [each / 1000 for each in zones if each is not None]
    load = _text(proc / "loadavg").split()
    return Readings(
        on_mains=any(known_mains) if known_mains else None if batteries or mains else _is_plugged_in(sys),
        battery_percent=min((each for each in batteries if each is not None), default=None),
        temperature_c=max(degrees, default=None),
        load_per_core=float(load[0]) / (os.cpu_count() or 1) if load else None,
    )


def why_not(schedule: ScheduleConfig, readings: Readings, now: datetime) -> str | None:
    """Return the first reason not to train now, None if there is none.

    Args:
        schedule: the bounds.
        readings: of this moment.
        now: local time.
    """
    window = schedule.window
    if window is not None and not is_inside(window, now.time()):
        return "outside_window"
    bounds = (
        (schedule.power == "mains", readings.on_mains, lambda plugged: plugged, "on_battery", "power_unknown"),
        (
            schedule.min_battery_percent is not None,
            readings.battery_percent,
            lambda found: found >= schedule.min_battery_percent,
            "battery_low",
            "battery_unknown",
        ),
        (
            schedule.max_temperature_c is not None,
            readings.temperature_c,
            lambda found: found <= schedule.max_temperature_c,
            "too_hot",
            "temperature_unknown",
        ),
        (
            schedule.max_load_per_core is not None,
            readings.load_per_core,
            lambda found: found <= schedule.max_load_per_core,
            "too_busy",
            "load_unknown",
        ),
    )
    for is_set, found, met, reason, unknown in bounds:
        if is_set and found is None:
            return unknown
        if is_set and not met(found):
            return reason
    return None


def is_inside(window: str, at: clock_time) -> bool:
    """Tell whether a time of day lies in `HH:MM-HH:MM`, which may pass midnight; the end is not part of it."""
    first, last = (clock_time.fromisoformat(each) for each in window.split("-"))
    return first <= at < last if first <= last else at >= first or at < last


class EnergyState(BaseModel):
    """Seconds of training booked on one day of the device's local time."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    day: str = ""
    booked_s: float = Field(default=0.0, ge=0)


class Gatekeeper:
    """Tells a trainer whether it may train now; looks at the sensors every `schedule.check_s` seconds.

    Args:
        schedule: the bounds.
        path: where the energy of the day is booked.
        read: returns the device's readings.
        now: returns the local time.
        monotonic: returns seconds that never go back.
    """

    def __init__(
        self,
        schedule: ScheduleConfig,
        path: Path,
        *,
        read: Callable[[], Readings] = read_device,
        now: Callable[[], datetime] = datetime.now,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self.schedule, self.path = schedule, path
        self._read, self._now, self._monotonic = read, now, monotonic
        self._next_look, self._reason = float("-inf"), None
        self._paid_until = float("-inf")
        self._energy = load_state(path, EnergyState) if schedule.energy is not None else EnergyState()

    def forbids(self) -> str | None:
        """Return why the trainer must not begin, or go on, None when it may."""
        if self._monotonic() >= self._next_look:
            self._reason = why_not(self.schedule, self._read(), self._now())
            self._next_look = self._monotonic() + self.schedule.check_s
        return self._reason or self._spent()

    def forbids_next_step(self) -> str | None:
        """Return why not to do one more step now, and book its energy if there is no reason.

        Raises:
            StorageError: the booking cannot be written.
        """
        reason = self.forbids()
        if reason is None:
            self._book()
        return reason

    def _spent(self) -> str | None:
        energy = self.schedule.energy
        if energy is None or self._monotonic() < self._paid_until:
            return None
        left_s = energy.wh_per_day * 3600 / energy.watts - self._booked_today()
        return None if left_s >= SLICE_S else "energy_spent"

    def _booked_today(self) -> float:
        return self._energy.booked_s if self._energy.day == self._now().strftime(DAY) else 0.0

    def _book(self) -> None:
        if self.schedule.energy is None or self._monotonic() < self._paid_until:
            return
        booked_s = self._booked_today() + SLICE_S
        self._energy = EnergyState(day=self._now().strftime(DAY), booked_s=booked_s)
        save_state(self.path, self._energy)
        self._paid_until = self._monotonic() + SLICE_S


def _is_plugged_in(sys: Path) -> bool | None:
    """A machine that lists supplies and has neither battery nor mains entry runs on mains; one that lists none may."""
    return True if (sys / "class/power_supply").is_dir() else None


def _text(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return ""


def _number(path: Path) -> float | None:
    with suppress(ValueError):
        return float(_text(path))
    return None

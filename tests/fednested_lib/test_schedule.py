"""A device trains when its owner allows it, and at no other time."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fednested_lib.config import EnergyConfig, ScheduleConfig
from fednested_lib.errors import StorageError
from fednested_lib.schedule import SLICE_S, Gatekeeper, Readings, is_inside, read_device, why_not

NOON = datetime(2026, 11, 22, 12, 0)
FINE = Readings(on_mains=True, battery_percent=80.0, temperature_c=45.0, load_per_core=0.3)
NOTHING = Readings(on_mains=None, battery_percent=None, temperature_c=None, load_per_core=None)
BOUNDS = {
    "power": ("mains", "on_mains", False, "on_battery", "power_unknown"),
    "min_battery_percent": (50.0, "battery_percent", 49.9, "battery_low", "battery_unknown"),
    "max_temperature_c": (60.0, "temperature_c", 60.1, "too_hot", "temperature_unknown"),
    "max_load_per_core": (0.5, "load_per_core", 0.51, "too_busy", "load_unknown"),
}


class Clock:
    """A wall clock and a monotonic one that move together."""

    def __init__(self, start: datetime):
        self.start, self.passed_s = start, 0.0

    def now(self) -> datetime:
        return self.start + timedelta(seconds=self.passed_s)

    def monotonic(self) -> float:
        return self.passed_s


def _supply(root: Path, name: str, **values: object) -> None:
    folder = root / "class/power_supply" / name
    folder.mkdir(parents=True)
    for key, value in values.items():
        (folder / key).write_text(f"{value}\n")


@pytest.mark.parametrize("key", BOUNDS)
def test_each_bound_forbids_alone(key: str) -> None:
    """A bound that is broken, or cannot be read, forbids training by name; one that is met does not."""
    bound, reading, broken, reason, unknown = BOUNDS[key]
    schedule = ScheduleConfig(**{key: bound})
    values = vars(FINE)
    assert why_not(schedule, FINE, NOON) is None
    assert why_not(schedule, Readings(**{**values, reading: broken}), NOON) == reason
    assert why_not(schedule, Readings(**{**values, reading: None}), NOON) == unknown


def test_without_bounds_nothing_is_asked() -> None:
    """A device whose owner sets no bound trains whatever its sensors say, or do not say."""
    assert why_not(ScheduleConfig(), NOTHING, NOON) is None


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("09:00-17:00", ["09:00", "16:59"], ["08:59", "17:00", "23:00"]),
        ("22:00-06:00", ["22:00", "23:59", "00:00", "05:59"], ["06:00", "21:59", "12:00"]),
    ],
)
def test_window_may_pass_midnight(window: str, inside: list[str], outside: list[str]) -> None:
    """The start of the window is part of it and its end is not, on both sides of midnight."""
    at = {text: is_inside(window, datetime.fromisoformat(f"2026-11-22T{text}").time()) for text in inside + outside}
    assert at == {**dict.fromkeys(inside, True), **dict.fromkeys(outside, False)}
    schedule = ScheduleConfig(window=window)
    assert why_not(schedule, NOTHING, datetime.fromisoformat(f"2026-11-22T{outside[0]}")) == "outside_window"


def test_sensors_of_a_laptop(tmp_path: Path) -> None:
    """Mains, the emptiest battery of the machine (not of its mouse) and the hottest zone are what counts."""
    _supply(tmp_path, "AC", type="Mains", online=0)
    _supply(tmp_path, "BAT0", type="Battery", capacity=71)
    _supply(tmp_path, "BAT1", type="Battery", capacity=34)
    _supply(tmp_path, "mouse", type="Battery", scope="Device", capacity=3)
    for zone, millidegrees in enumerate((41000, 63500)):
        folder = tmp_path / f"class/thermal/thermal_zone{zone}"
        folder.mkdir(parents=True)
        (folder / "temp").write_text(str(millidegrees))
    (tmp_path / "loadavg").write_text("2.50 1.00 0.50 1/100 4242\n")
    found = read_device(sys=tmp_path, proc=tmp_path)
    assert (found.on_mains, found.battery_percent, found.temperature_c) == (False, 34.0, 63.5)
    assert found.load_per_core is not None
    (tmp_path / "class/power_supply/AC/online").write_text("1")
    assert read_device(sys=tmp_path, proc=tmp_path).on_mains is True


def test_sensors_of_a_box_without_any(tmp_path: Path) -> None:
    """A machine with no supply to list runs on mains; without the file system of sensors nothing is known."""
    assert read_device(sys=tmp_path, proc=tmp_path) == NOTHING
    (tmp_path / "class/power_supply").mkdir(parents=True)
    assert read_device(sys=tmp_path, proc=tmp_path).on_mains is True


def _train_for_a_day(schedule: ScheduleConfig, path: Path, clock: Clock, step_s: float, restart_every: int) -> float:
    """Train whenever allowed until midnight, in a process that is killed again and again; returns seconds trained."""
    trained, steps, gate = 0.0, 0, None
    while clock.now().date() == clock.start.date():
        if gate is None or (steps and steps % restart_every == 0):
            gate = Gatekeeper(schedule, path, read=lambda: FINE, now=clock.now, monotonic=clock.monotonic)
        allowed = gate.forbids_next_step() is None
        trained, steps = trained + step_s * allowed, steps + allowed
        clock.passed_s += step_s if allowed else 600.0
    return trained


@pytest.mark.parametrize("restart_every", [7, 10**9])
def test_energy_of_a_day_is_never_exceeded(tmp_path: Path, restart_every: int) -> None:
    """With 10 W and 1 Wh a device trains 360 s a day at most, however often it is killed, and again the next day."""
    schedule = ScheduleConfig(energy=EnergyConfig(watts=10, wh_per_day=1))
    clock = Clock(NOON)
    trained = _train_for_a_day(schedule, tmp_path / "energy.json", clock, 1.0, restart_every)
    assert 60 <= trained <= 360
    assert restart_every < 100 or trained >= 360 - SLICE_S
    gate = Gatekeeper(schedule, tmp_path / "energy.json", read=lambda: FINE, now=clock.now, monotonic=clock.monotonic)
    assert gate.forbids() is None
    clock.start, clock.passed_s = NOON, 0.0
    spent = Gatekeeper(schedule, tmp_path / "other.json", read=lambda: FINE, now=clock.now, monotonic=clock.monotonic)
    while spent.forbids_next_step() is None:
        clock.passed_s += 1.0
    assert spent.forbids() == "energy_spent"


def test_sensors_are_read_only_so_often(tmp_path: Path) -> None:
    """A step of milliseconds does not read the sensors each time, and a change shows after `check_s`."""
    clock, reads = Clock(NOON), []
    schedule = ScheduleConfig(max_temperature_c=60, check_s=10)

    def read() -> Readings:
        reads.append(clock.passed_s)
        return Readings(**{**vars(FINE), "temperature_c": 50.0 + clock.passed_s})

    gate = Gatekeeper(schedule, tmp_path / "energy.json", read=read, now=clock.now, monotonic=clock.monotonic)
    reasons = {}
    for clock.passed_s in (0.0, 5.0, 9.9, 10.0, 19.9, 20.0):
        reasons[clock.passed_s] = gate.forbids()
    assert reads == [0.0, 10.0, 20.0]
    assert reasons == {0.0: None, 5.0: None, 9.9: None, 10.0: None, 19.9: None, 20.0: "too_hot"}


def test_altered_energy_file_is_named(tmp_path: Path) -> None:
    """Whoever edits the booking gets one clear error, not a fresh day."""
    path = tmp_path / "energy.json"
    path.write_text('{"day": "2026-11-22", "booked_s": "none"}')
    with pytest.raises(StorageError, match="unusable"):
        Gatekeeper(ScheduleConfig(energy=EnergyConfig(watts=10, wh_per_day=1)), path)

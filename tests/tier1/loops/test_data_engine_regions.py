"""A turn of the data engine region by region: what one turn in one piece would do, whatever a region does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fednested_lib.errors import ConfigError
from fednested_lib.log import TELEMETRY
from tests.federation import device_key
from tests.tier1.loops.test_data_engine import FIVE, HOUR, REGIONS, Fleet, workspace
from tier1.federation import Federation, open_federation
from tier1.loops import data_engine
from tier1.loops.data_engine import load_state, turn_engine
from tier1.loops.data_engine_regions import collect_turn, hear_region, plan_turn
from tier1.loops.records import EngineReport


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(open_federation(workspace(tmp_path)))


def twin(fed: Federation, directory: Path) -> Federation:
    """Return the same federation with a memory of its own: what it finds is what one turn would."""
    return Federation(config=fed.config.model_copy(update={"home": directory}))


def state(fed: Federation):
    return load_state(fed.home / "data-engine/state.json")


def in_regions(fed: Federation, hour: float) -> EngineReport:
    turn, regions = plan_turn(fed)
    return collect_turn(fed, turn, [hear_region(fed, turn, region) for region in regions], now=hour * HOUR)


def tell(fleet: Fleet, north: float) -> None:
    """Everybody tells a loss, and somebody each of the things that do not count."""
    for client in FIVE:
        fleet.tell(client, north if REGIONS[client] == "north" else 2.0)
    fleet.tell("d1", 9.0, signer=device_key("d0"))
    fleet.tell("d3", 9.0, sequence=0)
    fleet.tell("stranger", 9.0)
    fleet.tell("d2", 9.0, federation="other")
    fleet.fed.log.append(TELEMETRY, key=b"d2", value=b"{}", headers={})


def test_regions_find_what_one_turn_finds(fleet: Fleet, tmp_path: Path) -> None:
    """A drift in north over eight turns: reports, refusals by reason, and memory are equal; so is the task."""
    whole = twin(fleet.fed, tmp_path / "whole")
    for hour in range(8):
        tell(fleet, 2.0 if hour < 6 else 2.3)
        shared, one = in_regions(fleet.fed, hour), turn_engine(whole, now=hour * HOUR)
        assert shared == one
        assert state(fleet.fed) == state(whole)
    assert [(each.kind, each.subject) for each in shared.findings] == [("drift", "north")]
    assert set(shared.ignored) == {"bad_event", "bad_signature", "foreign_federation", "repeated", "unknown_client"}


def test_a_region_that_failed_is_heard_by_who_collects(fleet: Fleet, tmp_path: Path) -> None:
    """A region that is left out would look silent: drop-out of south would be raised for a pod that was lost."""
    whole = twin(fleet.fed, tmp_path / "whole")
    tell(fleet, 2.0)
    turn, regions = plan_turn(fleet.fed)
    assert regions == ["north", "south"]
    done = [hear_region(fleet.fed, turn, "north"), None]
    assert (done[0].devices, done[0].counted) == (3, 3)
    assert collect_turn(fleet.fed, turn, done, now=HOUR) == turn_engine(whole, now=HOUR)


def test_what_a_region_told_is_read_once(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second attempt, and who collects, find it; each region looks at the signatures of its own devices alone."""
    tell(fleet, 2.0)
    turn, regions = plan_turn(fleet.fed)
    asked: list[str] = []
    verify = data_engine.verify
    monkeypatch.setattr(data_engine, "verify", lambda key, *rest: asked.append(key) or verify(key, *rest))
    for region in (*regions, *regions):
        hear_region(fleet.fed, turn, region)
    collect_turn(fleet.fed, turn, [None, None], now=HOUR)
    assert sorted(asked) == sorted(device_key(client).public_key for client in (*FIVE, "d1"))
    assert not (fleet.fed.home / "data-engine/turns").exists()


def test_after_another_turn_the_plan_is_void(fleet: Fleet) -> None:
    """Somebody turned the engine meanwhile, or this is a second attempt: nothing is counted twice."""
    tell(fleet, 2.0)
    turn, regions = plan_turn(fleet.fed)
    heard = [hear_region(fleet.fed, turn, region) for region in regions]
    assert turn_engine(fleet.fed, now=HOUR).counted == 5
    for hour in (2, 3):  # once with a plan that does not fit, once after its files are gone
        assert collect_turn(fleet.fed, turn, heard, now=hour * HOUR).counted == 0
    with pytest.raises(ConfigError, match="run data_engine_regions again"):
        hear_region(fleet.fed, turn, "north")


def test_without_devices_and_with_an_unknown_region(fleet: Fleet, tmp_path: Path) -> None:
    """No device is no region, and the turn is made where it is collected; a region that is not the plan's is named."""
    turn, _ = plan_turn(fleet.fed)
    with pytest.raises(ConfigError, match="region must be one of north, south, got ../west"):
        hear_region(fleet.fed, turn, "../west")
    empty = Federation(config=fleet.fed.config.model_copy(update={"devices": {}, "home": tmp_path / "empty"}))
    assert plan_turn(empty)[1] == []
    report = replace(in_regions(empty, 1), ignored={})
    assert (report.counted, report.findings) == (0, [])

"""The virtual clock keeps time, and the figure that it measures can fail."""

from __future__ import annotations

from itertools import islice
from statistics import median

import pytest

from benchmarks import asynchrony, small_federation
from benchmarks.asynchrony import Point, Way, both, durations, round_ends, round_losses, speed_up
from benchmarks.small_federation import SEQ_LEN, SmallFederation
from benchmarks.virtual_clock import play


def _play(seconds: list[float], *, window: int, waits: bool, n: int) -> tuple[list[float], list[str]]:
    """Return the first `n` full buffers and everything that happened, in order."""
    happened = []
    clock = play(
        len(seconds),
        window=window,
        waits=waits,
        duration=lambda device: seconds[device],
        start=lambda device: happened.append(f"start {device}"),
        finish=lambda device: happened.append(f"finish {device}"),
    )
    times = []
    for now in islice(clock, n):
        times.append(now)
        happened.append("full")
    return times, happened


def test_a_synchronous_round_lasts_as_long_as_its_slowest_device() -> None:
    """Nobody starts before the buffer is full, and then all do."""
    times, happened = _play([1.0, 5.0, 2.0], window=3, waits=True, n=2)
    assert times == [5.0, 10.0]
    starts = ["start 0", "start 1", "start 2"]
    assert happened[:7] == [*starts, "finish 0", "finish 2", "finish 1", "full"]
    assert sorted(happened[7:10]) == starts


def test_asynchronous_devices_never_wait() -> None:
    """Each device sends one update per duration of its own, whoever is slow, and starts behind the fold it filled."""
    times, happened = _play([1.0, 2.0, 4.0], window=7, waits=False, n=4)
    assert times == [4.0, 8.0, 12.0, 16.0]
    assert [happened.count(f"finish {device}") for device in range(3)] == [16, 8, 4]
    at = happened.index("full")
    assert (happened[at - 1], happened[at + 1]) == ("finish 2", "start 2")


def test_devices_that_finish_at_once_do_so_by_number() -> None:
    """The same durations give the same order, so a run repeats itself."""
    happened = _play([3.0, 3.0, 3.0], window=3, waits=False, n=2)[1]
    assert [each for each in happened if each.startswith("finish")] == ["finish 0", "finish 1", "finish 2"] * 2


def test_durations_are_those_of_the_claim() -> None:
    """Thirds of about 100, 200 and 400 s with 5 s of communication; lognormal ones differ each time; all repeat."""
    steps = durations("steps", 0)
    drawn = [steps(device) for device in range(16)]
    assert [round(seconds / 100) for seconds in drawn[:3]] == [1, 2, 4]
    assert all(abs(seconds - 5 - (100, 200, 400)[device % 3]) < 25 for device, seconds in enumerate(drawn))
    tail, again = durations("heavy_tail", 0), durations("heavy_tail", 0)
    first = [tail(0) for _ in range(1000)]
    assert first == [again(0) for _ in range(1000)]
    assert 80 < median(first) < 125
    assert 3 * 400 < round_ends("steps", 0, 3)[-1] < 3 * 425


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation with four devices, one round, and two steps of everything."""
    monkeypatch.setattr(asynchrony, "N_DEVICES", 4)
    monkeypatch.setattr(asynchrony, "ROUNDS", 1)
    monkeypatch.setattr(asynchrony, "SYNCHRONOUS", Way(window=4, waits=True))
    monkeypatch.setattr(asynchrony, "TRAINING", {**asynchrony.TRAINING, "steps": 2})
    monkeypatch.setattr(small_federation, "CORE", {**small_federation.CORE, "steps": 2})
    round_losses.cache_clear()
    yield
    round_losses.cache_clear()


def test_an_asynchronous_run_that_waits_for_all_gains_nothing(small, monkeypatch) -> None:
    """With the difference taken away the same loss comes at the same time, to the bit: the figure is 1 and short."""
    monkeypatch.setattr(asynchrony, "ASYNCHRONOUS", asynchrony.SYNCHRONOUS)
    rounds, champions = both("steps", 0)
    assert rounds == champions
    assert rounds[1].loss < rounds[0].loss
    assert speed_up(rounds, champions) == 1.0


def test_each_way_is_tuned_by_itself(small, monkeypatch) -> None:
    """The rounds that end lowest are the target, and of the runs to it the first counts; at equal ways it is them."""
    monkeypatch.setattr(asynchrony, "ASYNCHRONOUS", asynchrony.SYNCHRONOUS)
    monkeypatch.setattr(asynchrony, "ETAS", (0.0, 4.0, 1.0))
    losses = {eta: round_losses(0, eta)[-1] for eta in asynchrony.ETAS}
    rounds, champions = asynchrony.tuned(0)
    assert rounds[-1].loss == min(losses.values()) < losses[1.0] < losses[0.0]
    assert champions == rounds


def test_a_run_that_never_gets_there_is_an_error() -> None:
    """A loss that is not reached in time is no speed-up."""
    with pytest.raises(RuntimeError, match="no champion reached 1"):
        speed_up([Point(at_s=0, loss=2.0), Point(at_s=9, loss=1.0)], [Point(at_s=0, loss=2.0)])


def test_a_slow_device_of_the_simulation_sends_a_stale_update(small, tmp_path) -> None:
    """What a device sends is made of the version it started from, though there is a newer one when it finishes."""
    federation = SmallFederation(
        tmp_path,
        seed=0,
        n_devices=3,
        adapters={"rank": 2, "alpha": 4.0},
        training={"steps": 2, "batch_size": 2, "seq_len": SEQ_LEN},
        sections={"window": {"min_updates": 2, "max_wait_s": 0.0}},
    )
    for device in (0, 1, 2):
        federation.start(device)
    for round_ in ((0, 1), (0, 2)):
        for device in round_:
            federation.finish(device)
        federation.fold()
        federation.start(0)
    federation.close()
    head = federation.tier1.chain.state().head
    accepted = federation.tier1.chain.entries()[head.seq].entry.body.candidate.accepted
    assert {row.client_id: (row.base_version, row.staleness) for row in accepted} == {
        "device-00": (2, 0),
        "device-02": (1, 1),
    }

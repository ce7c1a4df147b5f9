from __future__ import annotations

import pytest

from fednested_lib.errors import LogError
from fednested_lib.log import TOPICS, InMemoryLog
from tests.tier1.versions.scene import LOCAL, Scene
from tier1.versions.cut import read_cut, take_cut


class Clock:
    """A clock that moves only when somebody sleeps; `on_sleep` may append records."""

    def __init__(self, on_sleep=lambda: None):
        self.time, self.on_sleep = 0.0, on_sleep

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.on_sleep()


def timed_cut(scene: Scene, clock: Clock, **arguments):
    defaults = {"min_updates": 2, "max_wait_s": 10.0, "max_updates": 100}
    return take_cut(scene.log, scene.chain.state(), now=clock.now, sleep=clock.sleep, **{**defaults, **arguments})


def other_log(scene: Scene, name: str = "scene") -> InMemoryLog:
    """Return an empty log, with the same identity unless named otherwise."""
    log = InMemoryLog(name=name)
    log.create_topics(TOPICS)
    return log


def test_cut_closes_at_k_updates(scene):
    """With K records there is no wait; before, the cut waits for them."""
    scene.send("ada", 0)
    clock = Clock(on_sleep=lambda: scene.send("bob", int(clock.time * 1000)))
    cut = timed_cut(scene, clock)
    assert cut.n_records == 2
    assert 0 < clock.time < 1


def test_cut_closes_after_t_seconds(scene):
    """Without K records the cut closes at the deadline with what there is, nothing included."""
    clock = Clock()
    assert timed_cut(scene, clock).n_records == 0
    assert clock.time == pytest.approx(10.0)
    scene.send("ada", 0)
    assert timed_cut(scene, Clock()).n_records == 1


def test_next_cut_starts_where_the_chain_ends(scene):
    """Cuts tile the log: no record twice, none left out."""
    for sequence in range(3):
        for client in scene.clients:
            scene.send(client, sequence)
    seen = []
    while (cut := scene.cut(max_updates=5)).n_records:
        seen += [(record.partition, record.offset) for record in read_cut(scene.log, cut)]
        scene.settle(scene.fold(cut))
    assert len(seen) == len(set(seen)) == 12


def test_bound_is_shared_between_partitions(scene):
    """A full partition does not keep the others waiting."""
    for sequence in range(20):
        scene.send("ada", sequence)
    scene.send("cat", 0)
    cut = scene.cut(max_updates=6)
    sizes = sorted(end - start for start, end in cut.ranges.values())
    assert cut.n_records == 6
    assert sizes == [0, 1, 5]


def test_replaced_log_is_a_named_stop(scene):
    """Another cluster or a topic that was made anew cannot answer for the one that was consumed."""
    scene.send("ada", 0)
    cut = scene.cut()
    scene.settle(scene.fold(cut))
    scene.log = other_log(scene, "another")
    scene.send("ada", 0, base=scene.chain.state().versions[0])  # the same record at the same offset
    for use in (scene.cut, lambda: read_cut(scene.log, cut)):
        with pytest.raises(LogError, match=f"scene/{LOCAL}, this one is another/{LOCAL}"):
            use()


def test_watermark_that_went_backwards_is_a_named_stop(scene):
    """A log that is shorter than what was consumed has lost records."""
    scene.send("ada", 0)
    scene.advance()
    scene.log = other_log(scene)
    with pytest.raises(LogError, match="watermarks went backwards"):
        scene.cut()


def test_reused_offsets_are_a_named_stop(scene):
    """A log that lost its end and grew past it again shows at the last consumed record."""
    scene.send("ada", 0)
    scene.advance()
    scene.log = other_log(scene)
    scene.send("ada", 7)
    scene.send("ada", 8)
    with pytest.raises(LogError, match=r"offset 0 has record digest .* the log re-used offsets"):
        scene.cut()


def test_records_removed_before_they_were_consumed_are_a_named_stop(scene):
    """Retention may remove what was consumed, never what was not."""
    for sequence in range(4):
        scene.send("ada", sequence)
    partition = next(p for p, (_, high) in scene.log.watermarks(LOCAL).items() if high)
    scene.settle(scene.fold(scene.cut(max_updates=2)))
    scene.log.delete_before(LOCAL, partition, 2)
    assert scene.cut().n_records == 2
    scene.log.delete_before(LOCAL, partition, 3)
    with pytest.raises(LogError, match=r"offsets 2\.\.2 were never consumed"):
        scene.cut()


def test_altered_record_is_a_named_stop(scene):
    """A cut whose records changed since it was taken is refused, with both digests."""
    scene.send("ada", 0)
    cut = scene.cut()
    scene.log = other_log(scene)
    scene.send("ada", 1)
    with pytest.raises(LogError, match=cut.records_digest):
        read_cut(scene.log, cut)

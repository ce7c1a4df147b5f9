"""A log that was accepted in place of one that lost records: where cuts go on, and what may no longer happen."""

from __future__ import annotations

from collections import Counter

import pytest

from fednested_lib.errors import ChainConflict, ChainCorrupt, ChainError, LogError
from fednested_lib.log import QUARANTINE, TOPICS, UPDATES, InMemoryLog, Record
from tests.tier1.versions.scene import Scene
from tier1.versions.audit import audit
from tier1.versions.manifest import Cut, LogAccepted
from tier1.versions.new_log import describe_log, lost_ranges
from tier1.versions.quarantine import publish_refused
from tier1.versions.replay import verify_log

WHO = {"operator": "op", "authorisation": "policy-1", "reason": "a test", "created_at": "2026-01-04T00:00:00+00:00"}


def accept(scene: Scene) -> LogAccepted:
    """Accept the scene's log as it is."""
    state = scene.chain.state()
    body = describe_log(scene.log, state, **WHO)
    scene.chain.append(body, state.next_seq)
    return body


def records(scene: Scene) -> list[Record]:
    return list(scene.log.read(UPDATES, scene.log.watermarks(UPDATES)))


def come_back(scene: Scene, kept: list[Record], name: str = "scene") -> None:
    """Replace the scene's log by one that holds `kept` of the updates, and what was in quarantine."""
    quarantined = list(scene.log.read(QUARANTINE, scene.log.watermarks(QUARANTINE)))
    scene.log = InMemoryLog(name=name)
    scene.log.create_topics(TOPICS)
    for record in (*kept, *quarantined):
        scene.log.append(record.topic, key=record.key, value=record.value, headers=dict(record.headers))


def claims(scene: Scene) -> Counter:
    bodies = [sealed.entry.body for sealed in scene.chain.entries() if sealed.entry.body.kind == "version"]
    return Counter((row.client_id, row.sequence) for body in bodies for row in body.candidate.accepted)


@pytest.fixture
def consumed(scene):
    """Four updates of one device, consumed in two cuts; its partition is the key of everything."""
    for sequence in range(4):
        scene.send("ada", sequence, base=scene.chain.state().versions[0])
    scene.advance_by = lambda n: scene.settle(scene.fold(scene.cut(max_updates=n)))
    scene.advance_by(2)
    scene.advance_by(2)
    scene.place = next(p for p, end in scene.chain.state().offsets.items() if end == 4)
    return scene


def test_a_healthy_log_is_not_accepted(consumed):
    """There is nothing to accept while the log holds the place where the chain stands; new records change nothing."""
    for _ in range(2):
        with pytest.raises(ChainError, match="nothing to accept"):
            describe_log(consumed.log, consumed.chain.state(), **WHO)
        consumed.send("ada", 9)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_cuts_go_on_at_the_first_record_that_was_not_consumed(consumed, kept):
    """A log that ends early goes on at its end; one that grew other records goes on at the first of these."""
    old = records(consumed)
    come_back(consumed, old[:kept])
    for sequence in range(10, 16):
        consumed.send("ada", sequence, base=consumed.chain.state().versions[0])
    body = accept(consumed)
    assert body.offsets[consumed.place] == kept
    assert lost_ranges(body) == {consumed.place: (kept, 4)}
    consumed.advance()
    assert claims(consumed) == Counter(("ada", sequence) for sequence in (*range(4), *range(10, 16)))


def test_the_same_records_at_the_same_offsets_are_another_input(consumed):
    """Devices that send again may restore the lost end to the byte: duplicates, and not taken for the old cut."""
    old = records(consumed)
    come_back(consumed, old[:2])
    accept(consumed)
    come_back(consumed, old)
    settlement = consumed.advance()
    assert settlement.outcome == "rejected"
    assert [row.reason for row in settlement.candidate.refused] == ["duplicate", "duplicate"]
    assert claims(consumed) == Counter(("ada", sequence) for sequence in range(4))
    assert consumed.cut().n_records == 0


def test_another_log_is_read_from_its_beginning(consumed):
    """Offsets of another cluster say nothing, even where the records are the same."""
    come_back(consumed, records(consumed), "another")
    consumed.send("ada", 4, base=consumed.chain.state().versions[0])
    assert accept(consumed).offsets[consumed.place] == 0
    consumed.advance()
    assert claims(consumed) == Counter(("ada", sequence) for sequence in range(5))
    assert [check.status for check in verify_log(consumed.chain, consumed.log)] == ["replaced", "replaced", "same"]


def test_what_the_accepted_log_still_holds_is_compared_on(consumed):
    """Only cuts that reach past the place where an operator went on are given up; the others are read again."""
    old = records(consumed)
    come_back(consumed, old[:3])
    accept(consumed)
    assert [check.status for check in verify_log(consumed.chain, consumed.log)] == ["same", "replaced"]
    come_back(consumed, [old[1], old[0], old[2]])
    with pytest.raises(LogError, match="altered or re-used"):
        verify_log(consumed.chain, consumed.log)


def test_the_audit_says_which_log_a_record_lay_in(consumed):
    """The same offset of two logs is two records."""
    come_back(consumed, [], "another")
    accept(consumed)
    consumed.send("ada", 4, base=consumed.chain.state().versions[0])
    consumed.advance()
    sources = [audit(consumed.chain, version).rows[0].source for version in (1, 3)]
    assert sources == [f"{UPDATES}[{consumed.place}]@0", f"{UPDATES}[{consumed.place}]@0 of log 1"]


def test_a_second_loss_is_seen_as_the_first_was(consumed):
    """After an accepted loss the chain still knows what it consumed before it."""
    old = records(consumed)
    come_back(consumed, old[:3])
    accept(consumed)
    assert consumed.chain.state().last_records[consumed.place] == (2, old[2].digest)
    come_back(consumed, old[:1])
    assert accept(consumed).offsets[consumed.place] == 1
    assert consumed.chain.state().generation == 2


def test_a_candidate_of_the_old_log_cannot_be_settled(consumed):
    """A fold that was ready when the log was given up is not committed: its records are sent again."""
    consumed.send("ada", 4, base=consumed.chain.state().versions[0])
    candidate = consumed.fold(consumed.cut())
    old = records(consumed)
    come_back(consumed, old[:4], "another")
    state = consumed.chain.state()
    same_place = describe_log(consumed.log, state, **WHO).model_copy(update={"offsets": dict(state.offsets)})
    consumed.chain.append(same_place, state.next_seq)
    with pytest.raises(ChainConflict, match="generation 0.*generation 1"):
        consumed.settle(candidate)


def test_a_rejection_across_logs_folds_the_archived_inputs_again(consumed):
    """Inputs that a rejection sets free come from the archive; the log that they lay in may be gone."""
    come_back(consumed, [], "another")
    accept(consumed)
    for sequence in range(4, 8):
        consumed.send("ada", sequence, base=consumed.chain.state().versions[0])
    consumed.advance()
    before = consumed.chain.state()
    consumed.decide("reject", 1)
    for sealed in consumed.chain.state().pending:
        candidate = sealed.entry.body.candidate
        again = consumed.settle(candidate)
        assert again.outcome == "advanced"
        after = consumed.chain.state()
        assert (after.offsets, after.last_records) == (before.offsets, before.last_records)
    assert not after.pending


def test_an_entry_that_skips_is_refused(consumed):
    """An acceptance must follow the one before it and say where the chain stood."""
    come_back(consumed, [], "another")
    state = consumed.chain.state()
    body = describe_log(consumed.log, state, **WHO)
    for wrong in ({"generation": 2}, {"consumed": {consumed.place: 3}}):
        with pytest.raises(ChainCorrupt, match="accepts log generation"):
            consumed.chain.append(body.model_copy(update=wrong), state.next_seq)


def test_quarantine_keeps_both_records_of_one_offset(consumed):
    """A refused record of the new log does not hide behind one of the old log at the same place."""
    good = records(consumed)
    for garbage in (b"one", b"two"):
        consumed.send_bytes("ada", garbage, b"")
        candidate = consumed.advance().candidate
        assert publish_refused(candidate.refused, candidate.inputs.cut, consumed.log) == 1
        assert publish_refused(candidate.refused, candidate.inputs.cut, consumed.log) == 0
        if garbage == b"one":
            come_back(consumed, good)
            accept(consumed)


def test_a_cut_of_the_first_log_keeps_its_bytes():
    """Chains that were written before there were generations keep digests and signatures."""
    cut = Cut(topic="t", log_id="l", ranges={"0": (0, 1)}, records_digest="0" * 64, n_records=1)
    assert b"generation" not in cut.to_bytes()
    assert Cut.model_validate_json(cut.to_bytes()) == cut

from __future__ import annotations

from fednested_lib.envelope import HEADER
from fednested_lib.log import MAX_RECORD_BYTES, QUARANTINE
from tests.tier1.versions.scene import LOCAL, Scene, random_delta
from tier1.versions.quarantine import REASON_HEADER, RECORD_HEADER, publish_refused


def settled(scene: Scene):
    """Send a good and two bad updates, settle, and return (refused, cut)."""
    scene.send("ada", 0)
    scene.send("ada", 0, random_delta(9))
    scene.send("eve", 0)
    candidate = scene.advance().sealed.entry.body.candidate
    return candidate.refused, candidate.inputs.cut


def quarantined(scene: Scene):
    return list(scene.log.read(QUARANTINE, scene.log.watermarks(QUARANTINE)))


def test_refused_records_keep_their_bytes_and_reason(scene):
    """Each refused record is in quarantine with its reason, its envelope and its payload; accepted ones are not."""
    refused, cut = settled(scene)
    assert publish_refused(refused, cut, scene.log) == 2
    found = {dict(record.headers)[REASON_HEADER]: record for record in quarantined(scene)}
    assert set(found) == {b"equivocation", b"unknown_client"}
    for row in refused:
        record = found[row.reason.encode()]
        (original,) = scene.log.read(LOCAL, {row.partition: (row.offset, row.offset + 1)})
        assert record.value == original.value
        assert dict(record.headers)[HEADER] == dict(original.headers)[HEADER]
        assert dict(record.headers)[RECORD_HEADER] == row.record_sha256.encode()


def test_publishing_again_adds_nothing(scene):
    """A second run after a crash sends what is missing and skips what is there."""
    refused, cut = settled(scene)
    assert publish_refused(refused[:1], cut, scene.log) == 1
    assert publish_refused(refused, cut, scene.log) == 1
    assert publish_refused(refused, cut, scene.log) == 0
    assert len(quarantined(scene)) == 2


def test_reason_survives_when_the_record_is_gone(scene):
    """If retention removed the source before, the reason is kept without the bytes."""
    refused, cut = settled(scene)
    for partition, (_, high) in scene.log.watermarks(LOCAL).items():
        scene.log.delete_before(LOCAL, partition, high)
    assert publish_refused(refused, cut, scene.log) == 2
    assert [record.value for record in quarantined(scene)] == [b"", b""]


def test_bytes_of_another_record_are_not_quarantined(scene):
    """If the log holds other bytes at that offset than were refused, they are not passed off as the refused ones."""
    refused, cut = settled(scene)
    replaced = [row.model_copy(update={"record_sha256": "0" * 64}) for row in refused]
    assert publish_refused(replaced, cut, scene.log) == 2
    assert [record.value for record in quarantined(scene)] == [b"", b""]


def test_record_too_large_for_quarantine_keeps_its_reason(scene):
    """A record at the size limit does not fit with its reason; the reason goes alone, nothing stops."""
    scene.log.append(LOCAL, key=b"ada", value=b"x" * (MAX_RECORD_BYTES - 40), headers={HEADER: b"{}"})
    candidate = scene.advance().sealed.entry.body.candidate
    assert publish_refused(candidate.refused, candidate.inputs.cut, scene.log) == 1
    assert dict(quarantined(scene)[0].headers)[REASON_HEADER] == b"bad_envelope"


def test_nothing_refused_needs_no_log(scene):
    """A cut without refusals does not touch the topic."""
    scene.send("ada", 0)
    candidate = scene.advance().sealed.entry.body.candidate
    scene.log.reachable = False
    assert publish_refused(candidate.refused, candidate.inputs.cut, scene.log) == 0

from __future__ import annotations

from functools import partial

import pytest

from fednested_lib.errors import ChainCorrupt
from tests.tier1.versions.scene import Scene, gate_record
from tier1.versions.build import refold
from tier1.versions.manifest import Entry
from tier1.versions.settings import Rates
from tier1.versions.state import ChainState, Sealed, derive


def versions(scene: Scene, n: int) -> None:
    """Advance head n times, one update of each client per version."""
    for sequence in range(n):
        for client in scene.clients:
            scene.send(client, sequence)
        assert scene.advance().outcome == "advanced"


def refold_pending(scene: Scene) -> None:
    """Fold every pending input again, oldest first, as the service does."""
    while scene.chain.state().pending:
        body = scene.chain.state().pending[0].entry.body
        candidate = refold(body.candidate, scene.chain.state(), Rates(), blobs=scene.blobs, archive=scene.archive)
        assert scene.settle(candidate).outcome == "advanced"


def numbers(state: ChainState) -> list[int]:
    """Return the version numbers from head to genesis."""
    return [view.version for view in state.head.lineage()]


def accepted_once(scene: Scene) -> dict[tuple[str, int], int]:
    """Count in how many entries that count (not voided, or spent) each (client, sequence) is accepted."""
    state, found = scene.chain.state(), {}
    for sealed in scene.chain.entries():
        body = sealed.entry.body
        if body.kind in ("version", "rejection") and state.spent.get(body.candidate.inputs.id()) == sealed.entry.seq:
            for update in body.candidate.accepted:
                key = (update.client_id, update.sequence)
                found[key] = found.get(key, 0) + 1
    return found


def test_head_follows_versions_and_champion_follows_approvals(scene):
    """Genesis is champion until a version is approved; head moves by itself."""
    versions(scene, 3)
    state = scene.chain.state()
    assert (state.head.version, state.champion.version) == (3, 0)
    scene.decide("approve", 2)
    state = scene.chain.state()
    assert (state.head.version, state.champion.version) == (3, 2)
    scene.decide("approve", 1)
    assert scene.chain.state().champion.version == 2  # the newest approved one, not the latest approval


def test_champion_falls_back_when_it_or_an_ancestor_is_rejected(scene):
    """An approval does not survive the rejection of what it is built on; the next newest approved version counts."""
    versions(scene, 3)
    scene.decide("approve", 1)
    scene.decide("approve", 3)
    scene.decide("reject", 2)
    assert scene.chain.state().champion.version == 1
    scene.decide("reject", 1)
    assert scene.chain.state().champion.version == 0


def test_rejected_head_spends_its_inputs(scene):
    """Rejecting head moves it back; the inputs are spent, not consumed again, and the number is not used again."""
    versions(scene, 2)
    offsets = scene.chain.state().offsets
    scene.decide("reject", 2)
    state = scene.chain.state()
    assert (state.head.version, state.voided, state.pending) == (1, {2}, ())
    assert state.offsets == offsets
    assert scene.cut().n_records == 0
    scene.send("ada", 9)
    scene.advance()
    assert numbers(scene.chain.state()) == [3, 1, 0]


def test_successors_of_a_rejected_version_are_folded_again(scene):
    """Versions 2 and 3 fall with 1; their inputs come back in order as 4 and 5, those of 1 do not."""
    versions(scene, 3)
    assert [view.version for view in scene.chain.state().successors(1)] == [2, 3]
    scene.decide("reject", 1)
    state = scene.chain.state()
    assert (state.head.version, state.voided) == (0, {1, 2, 3})
    assert [sealed.entry.body.version for sealed in state.pending] == [2, 3]
    refold_pending(scene)
    state = scene.chain.state()
    assert numbers(state) == [5, 4, 0]
    bodies = [scene.chain.entries()[view.seq].entry.body for view in (state.versions[4], state.versions[5])]
    assert [{u.sequence for u in body.candidate.accepted} for body in bodies] == [{1}, {2}]
    assert state.spent[scene.chain.entries()[1].entry.body.candidate.inputs.id()] == 1
    assert set(accepted_once(scene).values()) == {1}
    assert len(accepted_once(scene)) == 12


def test_refolded_inputs_keep_the_offsets(scene):
    """Folding old inputs again neither moves the offsets back nor forward."""
    versions(scene, 3)
    offsets = scene.chain.state().offsets
    scene.decide("reject", 1)
    refold_pending(scene)
    assert scene.chain.state().offsets == offsets
    scene.send("ada", 7)
    assert scene.cut().n_records == 1


def test_rejecting_a_refolded_ancestor_sets_the_same_inputs_free_again(scene):
    """A second rejection further up voids the refolded versions too, and their inputs are pending again."""
    versions(scene, 3)
    scene.decide("reject", 2)
    refold_pending(scene)
    assert numbers(scene.chain.state()) == [4, 1, 0]
    scene.decide("reject", 1)
    refold_pending(scene)
    assert numbers(scene.chain.state()) == [5, 0]
    assert set(accepted_once(scene).values()) == {1}


def test_rejecting_a_version_whose_inputs_are_pending_spends_them(scene):
    """If a person rejects a version that fell with its ancestor, its inputs are not folded again."""
    versions(scene, 3)
    scene.decide("reject", 1)
    scene.decide("reject", 2)
    assert [sealed.entry.body.version for sealed in scene.chain.state().pending] == [3]
    refold_pending(scene)
    assert numbers(scene.chain.state()) == [4, 0]
    assert set(accepted_once(scene).values()) == {1}


def test_rejecting_a_voided_version_after_its_inputs_were_folded_again_changes_nothing(scene):
    """The inputs belong to the version that folded them last."""
    versions(scene, 2)
    scene.decide("reject", 1)
    refold_pending(scene)
    before = scene.chain.state()
    scene.decide("reject", 2)
    after = scene.chain.state()
    assert (after.head.version, after.pending, after.claims) == (before.head.version, (), before.claims)


def test_pending_updates_are_not_seen_until_folded_again(scene):
    """While inputs are pending a new cut may carry the same update; the first fold has it, the other refuses."""
    delta_sender = partial(scene.send, "ada", 1, base=scene.chain.state().head)
    versions(scene, 1)
    delta_sender()
    scene.advance()
    delta_sender()  # the device sends it again
    scene.decide("reject", 1)
    assert ("ada", 0, 1) not in scene.chain.state().claims
    scene.advance()
    assert ("ada", 0, 1) in scene.chain.state().claims
    candidate = refold(
        scene.chain.state().pending[0].entry.body.candidate,
        scene.chain.state(),
        Rates(),
        blobs=scene.blobs,
        archive=scene.archive,
    )
    assert [record.reason for record in candidate.refused] == ["duplicate"]
    assert scene.settle(candidate).outcome == "rejected"
    assert accepted_once(scene)["ada", 1] == 1


def test_staleness_counts_versions_of_the_lineage(scene):
    """τ counts heads between base and parent; voided versions and automatic rejections are no heads."""
    versions(scene, 3)
    assert [scene.chain.state().head.staleness(base) for base in (0, 1, 2, 3)] == [3, 2, 1, 0]
    scene.decide("reject", 2)
    refold_pending(scene)  # lineage 4, 1, 0
    assert [scene.chain.state().head.staleness(base) for base in (0, 1, 2, 3, 4)] == [2, 1, 1, 1, 0]
    scene.send("ada", 8)
    scene.settle(scene.fold(scene.cut()), gate=lambda candidate: gate_record(candidate, False), max_tries=1)
    assert scene.chain.state().head.staleness(4) == 0


def tampered(scene: Scene, seq: int, **changes) -> list[Sealed]:
    """Return the entries with fields of one body changed, as a committer with a bug would have signed them."""
    entries = scene.chain.entries()
    document = entries[seq].entry.model_dump(mode="json")
    document["body"] |= changes
    entries[seq] = Sealed(Entry.model_validate(document), entries[seq].digest)
    return entries


def test_entries_that_contradict_the_chain_are_named(scene):
    """A signature does not make a wrong entry right: numbers, parents, offsets and double use are checked."""
    versions(scene, 2)
    scene.decide("approve", 2)
    body = scene.chain.entries()[2].entry.body.model_dump(mode="json")
    cases = [
        (tampered(scene, 2, version=5), "000002.json has version 5, must have 2"),
        (tampered(scene, 2, offsets={"0": 99}), "000002.json records offsets"),
        (tampered(scene, 2, candidate=body["candidate"] | {"parent_version": 0}), "000002.json is built on"),
        (tampered(scene, 3, version=9), "000003.json decides on version 9"),
        (tampered(scene, 3, manifest="e" * 64), "000003.json decides on version 2"),
    ]
    first = scene.chain.entries()[1].entry.body.candidate.model_dump(mode="json")
    cases += [
        (
            tampered(scene, 2, candidate=body["candidate"] | {"inputs": first["inputs"]}),
            "000002.json consumes the inputs of 000001.json again",
        ),
        (
            tampered(scene, 2, candidate=body["candidate"] | {"accepted": first["accepted"]}),
            "000002.json accepts sequence 0 of .* a second time",
        ),
    ]
    cut = first["inputs"]["cut"]
    ranges = {partition: [start, end] for partition, (start, end) in cut["ranges"].items()}
    replayed = {"cut": cut | {"ranges": ranges, "records_digest": "0" * 64}, "dense": None}
    cases.append((tampered(scene, 2, candidate=body["candidate"] | {"inputs": replayed}), "000002.json consumes from"))
    for entries, message in cases:
        with pytest.raises(ChainCorrupt, match=message):
            derive(entries)
    with pytest.raises(ChainCorrupt, match="genesis and nothing else stands first"):
        derive(scene.chain.entries()[1:])
    derive(scene.chain.entries())


def test_genesis_cannot_be_rejected(scene):
    """Everything is built on version 0."""
    with pytest.raises(ChainCorrupt, match="rejects genesis"):
        scene.decide("reject", 0)

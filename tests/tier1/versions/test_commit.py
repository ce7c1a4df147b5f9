from __future__ import annotations

import threading
from functools import partial

import pytest

from fednested_lib.errors import ChainConflict, ChainCorrupt, ChainError, StorageError
from tests.tier1.versions.scene import Scene, gate_record, passing_gate, random_delta
from tier1.versions.build import refold
from tier1.versions.candidates import load_candidate, save_candidate
from tier1.versions.settings import Rates


def failing(n: int):
    """Return a gate that fails n times and passes then."""
    calls = []

    def gate(candidate):
        calls.append(candidate)
        return gate_record(candidate, len(calls) > n)

    return gate


def outcomes(settlement) -> list[str]:
    return [one.outcome for one in settlement.sealed.entry.body.tries]


def sent(scene: Scene, n: int = 1) -> Scene:
    for client in scene.clients[:n]:
        scene.send(client, scene.chain.state().seq)
    return scene


def test_passing_gate_advances_head(scene):
    """The entry holds candidate, gate result bound to it, and the offsets after it."""
    cut = sent(scene, 3).cut()
    settlement = scene.settle(scene.fold(cut))
    body = settlement.sealed.entry.body
    assert (settlement.outcome, body.version, outcomes(settlement)) == ("advanced", 1, ["passed"])
    assert body.tries[-1].gate.candidate == body.candidate.digest()
    assert body.offsets == {partition: end for partition, (_, end) in cut.ranges.items()}
    assert scene.chain.state().head.digest == settlement.sealed.digest


@pytest.mark.parametrize("inputs", ["cut", "dense"])
def test_failing_gate_halves_eta_and_records_the_try(scene, inputs):
    """After two failures the third candidate, with a quarter of every η, passes; all three are recorded."""
    made = sent(scene).cut() if inputs == "cut" else scene.dense("run-1")
    settlement = scene.settle(scene.fold(made), gate=failing(2))
    tries = settlement.sealed.entry.body.tries
    assert outcomes(settlement) == ["gate_failed", "gate_failed", "passed"]
    assert [one.rates.eta_t2 for one in tries] == [1.0, 0.5, 0.25]
    assert [one.rates.eta_core for one in tries] == [1.0, 0.5, 0.25]
    assert settlement.sealed.entry.body.candidate.rates == Rates(eta_core=0.25, eta_t1=0.25, eta_t2=0.25)
    assert len({one.candidate for one in tries}) == 3
    assert all(one.gate.candidate == one.candidate for one in tries)


def test_inputs_that_keep_failing_are_rejected_and_spent(scene):
    """After max_tries failures the rejection is an entry: no version number, inputs spent, sequences seen."""
    before = scene.chain.state().head
    settlement = scene.settle(scene.fold(sent(scene).cut()), gate=failing(99), max_tries=2)
    state = scene.chain.state()
    assert settlement.outcome == "rejected"
    assert settlement.sealed.entry.body.kind == "rejection"
    assert outcomes(settlement) == ["gate_failed", "gate_failed"]
    assert settlement.sealed.entry.body.reason == "automatic gate failed 2 times: measured"
    assert state.head == before
    assert scene.cut().n_records == 0
    assert ("ada", 0, 0) in state.claims
    sent(scene, 2)
    assert scene.advance().sealed.entry.body.version == 1


def test_cut_without_an_acceptable_update_takes_no_version(scene):
    """Refused records are spent as a rejection, and the gate is not asked."""
    scene.send("eve", 0)
    settlement = scene.settle(scene.fold(scene.cut()), gate=pytest.fail)
    assert settlement.sealed.entry.body.reason == "no update accepted: 1 refused"
    assert scene.chain.state().head.version == 0
    assert scene.cut().n_records == 0


def test_empty_cut_writes_nothing(scene):
    """Nothing arrived: no entry, no gate."""
    settlement = scene.settle(scene.fold(scene.cut()), gate=pytest.fail)
    assert (settlement.outcome, settlement.sealed, len(scene.chain.entries())) == ("nothing", None, 1)


@pytest.mark.parametrize("inputs", ["cut", "dense"])
def test_second_run_of_the_same_inputs_is_a_no_op(scene, inputs):
    """Settling the same candidate again, or folding the same inputs anew, finds the entry and appends nothing."""
    made = sent(scene).cut() if inputs == "cut" else scene.dense("run-1")
    candidate = scene.fold(made)
    first = scene.settle(candidate)
    for again in (candidate, scene.fold(made)):
        settlement = scene.settle(again, gate=pytest.fail)
        assert (settlement.outcome, settlement.sealed) == ("already", first.sealed)
    assert len(scene.chain.entries()) == 2


def test_rejected_inputs_are_not_folded_by_a_second_run(scene):
    """A second run of inputs that a person or the gate rejected finds that entry."""
    cut = sent(scene).cut()
    candidate = scene.fold(cut)
    scene.settle(candidate)
    scene.decide("reject", 1)
    assert scene.settle(candidate, gate=pytest.fail).outcome == "already"
    assert scene.chain.state().head.version == 0


def test_overlapping_cut_is_a_conflict(scene):
    """A cut that starts where another committer's started, but ends elsewhere, must be taken anew."""
    sent(scene)
    early = scene.fold(scene.cut())
    scene.send("ada", 1)
    scene.settle(scene.fold(scene.cut()))
    with pytest.raises(ChainConflict, match="take a new cut"):
        scene.settle(early)


def test_core_update_lands_on_the_new_head_after_two_folds(scene):
    """A dense candidate that was folded on version 0 is folded again on version 2, and the lost race is recorded."""
    candidate = scene.fold(scene.dense("run-1"))
    for _ in range(2):
        sent(scene, 2)
        scene.advance()
    settlement = scene.settle(candidate)
    assert outcomes(settlement) == ["lost_race", "passed"]
    assert scene.chain.state().head.parent.version == 2
    fold = partial(refold, candidate, blobs=scene.blobs, archive=scene.archive)
    assert settlement.candidate.blobs == _folded_on(scene, fold, 2)


def _folded_on(scene: Scene, fold, version: int):
    state = scene.chain.state()
    views = {number: view for number, view in state.versions.items() if number <= version}
    return fold(type(state)(**{**vars(state), "versions": views}), Rates()).blobs


def other(scene: Scene) -> Scene:
    """Open the same federation a second time, as another process would."""
    return Scene(scene.home, log=scene.log)


def settle_at_once(scenes, candidates) -> list:
    """Settle in one thread each; every gate waits until all gates are asked, so that all race for one position."""
    barrier = threading.Barrier(len(scenes), timeout=60)
    results = [None] * len(scenes)

    def run(i: int) -> None:
        first = []

        def gate(candidate):
            if not first:
                first.append(barrier.wait())
            return passing_gate(candidate)

        results[i] = scenes[i].settle(candidates[i], gate=gate)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(scenes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def test_two_committers_at_once_one_wins_the_other_folds_again(scene):
    """A device cut and a core update race: both end in the chain, the loser on the winner's head with its lost race."""
    cut, dense = sent(scene, 3).cut(), scene.dense("run-1")
    results = settle_at_once([scene, other(scene)], [scene.fold(cut), scene.fold(dense)])
    assert [result.outcome for result in results] == ["advanced", "advanced"]
    first, second = (scene.chain.entries()[seq].entry.body for seq in (1, 2))
    assert [one.outcome for one in first.tries] == ["passed"]
    assert [one.outcome for one in second.tries] == ["lost_race", "passed"]
    assert (
        second.tries[0].gate is not None
    )  # it had passed its gate on the old head, and was gated again on the new one
    assert second.candidate.parent_version == 1


def test_two_committers_with_the_same_cut_commit_it_once(scene):
    """Two runs of the same cut at once: one advances head, the other finds the entry."""
    cut = sent(scene, 3).cut()
    results = settle_at_once([scene, other(scene)], [scene.fold(cut), scene.fold(cut)])
    assert sorted(result.outcome for result in results) == ["advanced", "already"]
    assert results[0].sealed == results[1].sealed
    assert len(scene.chain.entries()) == 2


def test_an_approval_in_between_is_no_lost_race(scene):
    """An entry that does not move head costs the committer its position, not its fold or its gate."""
    sent(scene)
    scene.advance()
    candidate = scene.fold(sent(scene).cut())
    calls = []

    def gate(folded):
        calls.append(folded)
        scene.decide("approve", 1)
        return passing_gate(folded)

    settlement = scene.settle(candidate, gate=gate)
    assert (settlement.outcome, outcomes(settlement), len(calls)) == ("advanced", ["passed"], 1)
    assert settlement.sealed.entry.seq == 3


def test_rejection_of_head_in_between_folds_on_its_parent(scene):
    """If a person rejects head while a candidate is gated, the candidate is folded again below it."""
    sent(scene)
    scene.advance()
    candidate = scene.fold(sent(scene, 2).cut())
    decided = []

    def gate(folded):
        if not decided:
            decided.append(scene.decide("reject", 1))
        return passing_gate(folded)

    settlement = scene.settle(candidate, gate=gate)
    assert outcomes(settlement) == ["lost_race", "passed"]
    assert [view.version for view in scene.chain.state().head.lineage()] == [2, 0]


def test_gate_result_about_another_candidate_is_refused(scene):
    """A gate result binds to the candidate's digest."""
    candidate = scene.fold(sent(scene).cut())
    wrong = gate_record(candidate, True).model_copy(update={"candidate": "a" * 64})
    with pytest.raises(ChainError, match="gate result is about candidate aaaaaaaaaaaa"):
        scene.settle(candidate, gate=lambda _: wrong)
    assert len(scene.chain.entries()) == 1


def test_full_disk_loses_nothing(scene, monkeypatch):
    """If the entry cannot be written, the chain is as before and a second run commits the same candidate."""
    candidate = scene.fold(sent(scene).cut())

    def full(*_):
        raise StorageError("disk full: cannot write 1 bytes")

    with monkeypatch.context() as patch:
        patch.setattr("tier1.versions.chain.create_exclusive", full)
        with pytest.raises(StorageError, match="disk full"):
            scene.settle(candidate)
    assert len(scene.chain.entries()) == 1
    assert scene.settle(candidate).candidate == candidate


def test_every_gated_candidate_is_on_disk(scene):
    """Each try's candidate can be read by its digest before and after the decision, and altered bytes are refused."""

    def gate(candidate):
        assert load_candidate(scene.home, candidate.digest()) == candidate
        return gate_record(candidate, len(list((scene.home / "candidates").iterdir())) == 2)

    scene.send("ada", 0, random_delta(3))
    settlement = scene.settle(scene.fold(scene.cut()), gate=gate)
    for one in settlement.sealed.entry.body.tries:
        assert load_candidate(scene.home, one.candidate).rates == one.rates
    path = scene.home / "candidates" / f"{settlement.candidate.digest()}.json"
    path.write_bytes(path.read_bytes().replace(b'"eta_t2":0.5', b'"eta_t2":0.9'))
    with pytest.raises(ChainCorrupt, match="was altered"):
        load_candidate(scene.home, settlement.candidate.digest())
    with pytest.raises(ChainError, match="fold it again"):
        load_candidate(scene.home, "0" * 64)
    assert save_candidate(scene.home, settlement.candidate) == settlement.candidate.digest()
    assert load_candidate(scene.home, settlement.candidate.digest()) == settlement.candidate

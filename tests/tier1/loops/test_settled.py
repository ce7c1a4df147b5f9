"""What tier 1 tells devices about updates that the chain has consumed."""

from __future__ import annotations

import pytest

from fednested_lib.events import UpdatesSettled, verify_event
from fednested_lib.log import CONTROL
from tests.federation import Device, make_federation
from tier1.loops import evaluate_and_promote, views
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import settle_candidate
from tier1.loops.views import sync_views


@pytest.fixture
def fed(tmp_path):
    """A federation with genesis."""
    fed = make_federation(tmp_path, aggregation={"max_norm": 1e6})
    take_updates(fed)
    return fed


def settled(fed) -> list[UpdatesSettled]:
    """Return the settlements on the control topic, each verified under tier 1's key."""
    low, high = fed.log.watermarks(CONTROL)[0]
    return [
        verify_event(record.value, dict(record.headers), fed.signer.public_key)
        for record in fed.log.read(CONTROL, {0: (low, high)})
    ]


def turn(fed):
    return settle_candidate(fed, fold_updates(fed, take_updates(fed)))


def test_a_cut_settles_what_it_accepted_and_what_it_refused(fed):
    """Accepted and refused updates are named by the entry that consumed them; forged ids and garbage are not."""
    ann, bob = Device(fed, "ann"), Device(fed, "bob")
    good, epoch, foreign = ann.send(), bob.send(key_epoch=3), bob.send(federation="other")
    forged = bob.send(sequence=7).to_bytes()
    bob.append(forged.replace(b'"num_examples":8', b'"num_examples":9'), b"x")
    bob.append(b"garbage", b"x")
    turn(fed)
    (event,) = settled(fed)
    entry = fed.chain.entries()[event.chain_seq].entry.body
    named = {row.update_id for row in entry.candidate.accepted} | {epoch.update_id}
    assert set(event.update_ids) == named
    assert good.update_id in named
    assert foreign.update_id not in named
    assert event.federation == "fednested"


def test_settling_is_told_once_and_again_after_a_crash(fed):
    """A second call adds nothing; without the mark, as a crash before it leaves things, the same is told again."""
    Device(fed, "ann").send()
    turn(fed)
    sync_views(fed)
    first = settled(fed)
    assert len(first) == 1
    (fed.home / "settled").unlink()
    sync_views(fed)
    assert settled(fed) == first * 2


def test_a_rejected_cut_is_settled_too(tmp_path):
    """Inputs that the automatic gate refused for good are spent: their devices need not keep them."""
    fed = make_federation(tmp_path, evaluation={"max_regression": 0.0, "max_tries": 1}, aggregation={"max_norm": 1e6})
    data = pack_datasets(fed, authorise_training(fed, "r1"))
    settle_candidate(fed, fold_dense(fed, train_delta(fed, data, "r1")))
    sent = Device(fed, "ann").send(size=3.0, base=fed.chain.state().head.version)
    assert turn(fed).status == "rejected"
    assert [event.update_ids for event in settled(fed)] == [[sent.update_id]]


def test_a_large_cut_is_told_in_bounded_events(fed, monkeypatch):
    """No event names more ids than its bound."""
    monkeypatch.setattr("tier1.loops.views.MAX_SETTLED", 2)
    sent = {Device(fed, client).send().update_id for client in ("ann", "bob", "cyd")}
    turn(fed)
    assert sorted(len(event.update_ids) for event in settled(fed)) == [1, 2]
    assert {each for event in settled(fed) for each in event.update_ids} == sent


def test_a_version_that_another_committer_adds_meanwhile_is_shown_too(fed, monkeypatch):
    """Repaired for version 1, then there is version 2, whose committer has not come to its views yet."""
    repair, late = views.repair_from_chain, []

    def overtaken(*arguments):
        changes = repair(*arguments)
        if not late:
            late.append(Device(fed, "bob").send())
            with monkeypatch.context() as other:
                other.setattr(evaluate_and_promote, "sync_views", lambda _fed: None)
                turn(fed)
        return changes

    Device(fed, "ann").send()
    turn(fed)
    monkeypatch.setattr(views, "repair_from_chain", overtaken)
    sync_views(fed)
    newest = fed.chain.entries()[-1]
    assert [row.update_id for row in newest.entry.body.candidate.accepted] == [late[0].update_id]
    assert fed.lineage.has(manifest_digest=newest.digest)
    assert fed.registry.get("candidate").manifest_digest == newest.digest

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fednested_lib.errors import (
    ChainConflict,
    ChainCorrupt,
    ChainError,
    ConfigError,
    EnvelopeError,
    GovernanceError,
    PolicyDenied,
)
from fednested_lib.events import parse_event
from fednested_lib.signing import Signer
from tests.federation import Device, make_federation, make_workspace
from tier1.federation import open_federation
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.broadcast import publish_champion
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import decide, newest_candidate, settle_candidate
from tier1.loops.replay import audit_version, replay_versions, verify_all


def core_round(fed, run="r1", base=None):
    grant = authorise_training(fed, run)
    return fold_dense(fed, train_delta(fed, pack_datasets(fed, grant), run, base))


def fast_round(fed, answer="approve"):
    settled = settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    return settled, decide(fed, settled, answer, "console")


def rebuilt(fed):
    return [line.split(":")[1].split(",")[0].strip() for line in replay_versions(fed) if line.startswith("version")]


@pytest.fixture
def fed(tmp_path):
    """A federation whose version 1 (a core update) is approved."""
    fed = make_federation(tmp_path)
    settled = settle_candidate(fed, core_round(fed))
    assert settled.status == "head"
    assert decide(fed, settled, "approve", "console").champion == 1
    return fed


def test_a_nested_round_moves_head_champion_registry_and_topic(fed):
    """Updates of three devices become version 2, which is approved, registered, published and replayed."""
    for client in ("ann", "bob", "cyd"):
        Device(fed, client).send()
    settled, outcome = fast_round(fed)
    assert (settled.status, settled.version, outcome.verdict, outcome.champion) == ("head", 2, "approved", 2)
    assert fed.registry.get("champion").manifest_digest == settled.manifest
    assert fed.registry.get("candidate") is None
    published = publish_champion(fed)
    low, high = fed.log.watermarks("control.federation_rounds")[0]
    event = parse_event(next(iter(fed.log.read("control.federation_rounds", {0: (high - 1, high)}))).value)
    assert (event.version, event.snapshot) == (published.version, published.snapshot) == (2, event.snapshot)
    assert rebuilt(fed) == ["identical"] * 3
    parts = ["chain", "anchor", "control topic", "archive", "log", "weights"]
    assert sorted({line.split(":")[0] for line in verify_all(fed)}) == sorted(parts)
    assert sum("accepted" in line for line in audit_version(fed, 2)) == 3


def test_an_empty_cut_is_nothing_and_asks_nobody(fed):
    """Without updates no candidate, no entry and no decision come about."""
    entries = len(fed.chain.entries())
    settled, outcome = fast_round(fed, answer="")
    assert (settled.status, outcome.verdict, outcome.champion) == ("nothing", "nothing", 1)
    assert len(fed.chain.entries()) == entries


def test_settling_twice_changes_nothing(fed):
    """A second run of the same inputs finds their entry: a crash after the commit costs nothing."""
    Device(fed, "ann").send()
    candidate = fold_updates(fed, take_updates(fed))
    first = settle_candidate(fed, candidate)
    entries = [sealed.digest for sealed in fed.chain.entries()]
    assert settle_candidate(fed, candidate) == first
    assert [sealed.digest for sealed in fed.chain.entries()] == entries


def test_a_rejected_version_is_void_and_its_inputs_are_spent(fed):
    """After a rejection head is the parent again and the next cut starts behind the rejected one."""
    Device(fed, "ann").send()
    settled, outcome = fast_round(fed, "reject: looks odd")
    state = fed.chain.state()
    assert (outcome.verdict, outcome.champion, state.head.version) == ("rejected", 1, 1)
    assert take_updates(fed).n_records == 0
    assert sum(state.offsets.values()) == 1


def test_what_devices_do_to_their_drop_box_cannot_hurt_an_accepted_update(fed):
    """Accepted inputs are tier 1's own: with the drop box overwritten and emptied, all is verified and rebuilt."""
    core_round(fed)
    envelope = Device(fed, "ann").send(rank=16)
    assert envelope.payload_uri is not None
    fast_round(fed)
    assert set(fed.payloads.digests()) == {envelope.payload_sha256}
    Path(fed.payloads.location(envelope.payload_sha256)).write_bytes(b"overwritten by its device")
    assert len(list(verify_all(fed))) > 1
    shutil.rmtree(fed.payloads.uri)
    assert all("identical" in line for line in rebuilt(fed))


def test_successors_of_a_rejected_version_are_folded_again_without_it(fed):
    """Rejecting version 2 while 3 is head makes version 4 from 3's inputs alone, on version 1."""
    ann, bob = Device(fed, "ann"), Device(fed, "bob")
    ann.send()
    second = settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    bob.send()
    third = settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    assert third.version == 3
    assert decide(fed, second, "reject", "console").verdict == "rejected"
    state = fed.chain.state()
    head = fed.chain.entries()[state.head.seq].entry.body
    assert (state.head.version, state.head.parent.version) == (4, 1)
    assert [row.client_id for row in head.candidate.accepted] == ["bob"]
    assert {2, 3} <= state.voided
    assert set(rebuilt(fed)) == {"identical"}


def test_a_rejection_that_died_before_its_refold_is_finished_by_the_next_round(fed, monkeypatch):
    """Killed between the decision and the fold of the successors' inputs, the next settling folds them first."""
    from tier1.loops import evaluate_and_promote

    ann, bob = Device(fed, "ann"), Device(fed, "bob")
    ann.send()
    second = settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    bob.send()
    settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    monkeypatch.setattr(evaluate_and_promote, "refold_pending", lambda fed: [])  # stands for the kill
    decide(fed, second, "reject", "console")
    monkeypatch.undo()
    assert fed.chain.state().head.version == 1
    ann.send()
    settled, _ = fast_round(fed)
    state = fed.chain.state()
    assert (settled.version, state.head.version, state.head.parent.version) == (5, 5, 4)
    assert not state.pending


def test_a_failing_gate_halves_eta_and_then_rejects(tmp_path):
    """A harmful update is tried with η, η/2, η/4; then its inputs are spent and head stays."""
    fed = make_federation(tmp_path, evaluation={"max_regression": 0.0, "max_tries": 3}, aggregation={"max_norm": 1e6})
    settled = settle_candidate(fed, core_round(fed))
    head = fed.chain.state().head.version
    Device(fed, "ann").send(size=3.0, base=head)
    settled = settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    body = fed.chain.entries()[-1].entry.body
    assert settled.status == "rejected"
    assert [one.rates.eta_t2 for one in body.tries] == [1.0, 0.5, 0.25]
    assert fed.chain.state().head.version == head
    assert decide(fed, settled, "", "console").verdict == "gate_rejected"
    assert take_updates(fed).n_records == 0


def test_a_core_update_that_ends_after_two_folds_lands_on_the_new_head(fed):
    """Training starts from version 1 and is folded into version 3; both folds stay."""
    data = pack_datasets(fed, authorise_training(fed, "slow"))
    trained = train_delta(fed, data, "slow", 1)
    for _ in range(2):
        Device(fed, "ann", sequence=fed.chain.state().head.version).send()
        fast_round(fed)
    assert fed.chain.state().head.version == 3
    settled = settle_candidate(fed, fold_dense(fed, trained))
    state = fed.chain.state()
    assert (settled.version, state.head.parent.version, trained.base_version) == (4, 3, 1)
    assert set(rebuilt(fed)) == {"identical"}


def test_of_two_committers_one_wins_and_the_other_folds_again(fed):
    """A candidate folded on version 1 after somebody made version 2 is folded again on 2, the race recorded."""
    trained = train_delta(fed, pack_datasets(fed, authorise_training(fed, "slow")), "slow", None)
    late = fold_dense(fed, trained)
    Device(fed, "ann").send()
    fast_round(fed)
    settled = settle_candidate(fed, late)
    tries = fed.chain.entries()[-1].entry.body.tries
    assert (settled.version, [one.outcome for one in tries]) == (3, ["lost_race", "passed"])


def test_the_same_cut_cannot_be_committed_by_two(fed):
    """Two overlapping cuts: the second committer is told to take a new one, nothing is consumed twice."""
    ann, bob = Device(fed, "ann"), Device(fed, "bob")
    ann.send()
    small = fold_updates(fed, take_updates(fed))
    bob.send()
    large = fold_updates(fed, take_updates(fed))
    settle_candidate(fed, large)
    with pytest.raises(ChainConflict, match="take a new cut"):
        settle_candidate(fed, small)


def test_refused_updates_stand_in_the_manifest_and_in_quarantine(fed):
    """An altered envelope is refused with its reason while the rest of the cut goes on."""
    Device(fed, "ann").send()
    bob = Device(fed, "bob")
    good = bob.send()
    bob.append(good.to_bytes().replace(b'"num_examples":8', b'"num_examples":9'), b"x")
    settled, _ = fast_round(fed)
    body = fed.chain.entries()[fed.chain.state().versions[settled.version].seq].entry.body
    assert len(body.candidate.accepted) == 2
    assert [row.reason for row in body.candidate.refused] == ["bad_update_id"]
    assert fed.log.watermarks("updates.experts.quarantine")[0] == (0, 1)


def test_a_run_goes_on_from_the_base_it_began_with(fed, monkeypatch):
    """Head moves while a killed run lies still: its retry takes up its checkpoint on the old base, to the bit."""
    from tier1.training.backends import TorchBackend

    data = pack_datasets(fed, authorise_training(fed, "r2"))
    core = fed.config.core.model_copy(update={"checkpoint_every": 2})
    fed = replace(fed, config=fed.config.model_copy(update={"core": core}))
    whole = train_delta(fed, data, "whole")
    step, taken = TorchBackend.step, []

    def dies(self, rows, rate):
        taken.append(rate)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return step(self, rows, rate)

    monkeypatch.setattr(TorchBackend, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_delta(fed, data, "r2")
    Device(fed, "ann").send()
    fast_round(fed)
    assert fed.chain.state().head.version == 2
    with pytest.raises(ChainError, match="base version of run r2 must be 1, from which it began, got 2"):
        train_delta(fed, data, "r2", 2)
    resumed = train_delta(fed, data, "r2")
    assert len(taken) == 6 + 2, "steps 5 and 6 were left"
    blobs = [receipt(fed, ref)["dense"]["blobs"] for ref in (whole, resumed)]
    assert blobs[0] == blobs[1]
    assert not list((fed.home / "dense").glob("*.checkpoints"))


def receipt(fed, ref):
    return json.loads((fed.home / "dense" / f"{ref.update_id}.json").read_bytes())


def test_a_run_that_died_after_training_publishes_its_delta_once(fed, monkeypatch):
    """The restarted run of the same name neither trains again nor publishes another delta."""
    data = pack_datasets(fed, authorise_training(fed, "r2"))
    first = train_delta(fed, data, "r2")
    end = fed.log.watermarks("updates.tier1")
    assert train_delta(fed, data, "r2") == first
    assert fed.log.watermarks("updates.tier1") == end


def test_training_needs_a_policy_that_allows_it(tmp_path):
    """Without an allow rule the core update stops before it reads data."""
    fed = make_federation(tmp_path)
    (tmp_path / "policy.yaml").write_text("version: 1\n")
    with pytest.raises(PolicyDenied, match="dataset:plays"):
        authorise_training(fed, "r1")
    assert not fed.chain.exists()


def test_an_answer_that_is_no_decision_is_refused_and_the_version_waits(fed):
    """Nonsense at the gate decides nothing."""
    Device(fed, "ann").send()
    settled = settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    with pytest.raises(GovernanceError, match="neither approve"):
        decide(fed, settled, "yes please do", "console")
    assert fed.chain.state().champion.version == 1
    assert newest_candidate(fed).digest == ""


def test_a_candidate_whose_cut_was_overtaken_is_passed_over(fed):
    """A round that died between fold and settle leaves a candidate that does not stop later rounds."""
    ann, bob = Device(fed, "ann"), Device(fed, "bob")
    ann.send()
    fold_updates(fed, take_updates(fed))  # and died here
    bob.send()
    settled, _ = fast_round(fed)
    assert settled.version == 2
    settled, outcome = fast_round(fed, answer="")
    assert (settled.status, outcome.verdict) == ("nothing", "nothing")


def test_a_trainer_cannot_promote_their_own_version_under_somebody_elses(tmp_path):
    """Approving version 2 makes its unapproved parent champion too, so the parent's trainer may not approve it."""
    from tier1.governance.approvals import issue

    config = make_workspace(tmp_path)
    alice = Signer.load(tmp_path / "keys/approver.key")
    document = yaml.safe_load(config.read_text())
    document["governance"] |= {"allow_unverified": False}
    document["identity"]["principal"] = "secops"  # alice is an approver and trains the core
    (tmp_path / "policy.yaml").write_text(
        (tmp_path / "policy.yaml").read_text().replace("[trainer]", "[trainer, secops]")
    )
    config.write_text(yaml.safe_dump(document))
    hers = open_federation(config)
    assert settle_candidate(hers, core_round(hers)).version == 1
    document["identity"]["principal"] = "trainer"
    config.write_text(yaml.safe_dump(document))
    fed = open_federation(config)
    Device(fed, "ann").send(base=1)
    settled = settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    token = issue(alice, verdict="approve", manifest_digest=settled.manifest, approver="secops", issued_at=1)
    outcome = decide(fed, settled, token, "console")
    assert (outcome.verdict, fed.chain.state().champion.version) == ("blocked", 0)
    assert "two_persons" in outcome.reason


def test_a_chain_whose_end_was_cut_off_is_refused_before_anything_is_built_on_it(fed):
    """Deleting the last entry is noticed by anchor before a fork or an announcement can be made."""
    Device(fed, "ann").send()
    fast_round(fed)
    publish_champion(fed)
    entries = sorted(fed.chain.root.glob("*.json"))
    entries[-1].unlink()
    for call in (lambda: settle_candidate(fed, newest_candidate(fed)), lambda: publish_champion(fed)):
        with pytest.raises(ChainCorrupt, match="restore"):
            call()
    assert sorted(fed.chain.root.glob("*.json")) == entries[:-1]


def test_a_dense_delta_of_another_chain_is_refused(fed, tmp_path):
    """A delta trained on weights that this chain does not have is not folded, whoever signed it."""
    from tier1.versions.dense_update import make_dense, parse_dense

    data = pack_datasets(fed, authorise_training(fed, "r9"))
    ref = train_delta(fed, data, "r9")
    _, high = fed.log.watermarks("updates.tier1")[0]
    record = next(iter(fed.log.read("updates.tier1", {0: (high - 1, high)})))
    fields = parse_dense(record.value).model_dump(exclude={"format", "update_id", "signer", "signature"})
    foreign = make_dense(fed.signer, **{**fields, "base_digest": "0" * 64})
    place = fed.log.append("updates.tier1", key=b"r9", value=foreign.to_bytes(), headers={})
    receipt = fed.home / "dense" / f"{ref.update_id}.json"
    text = (
        receipt.read_text()
        .replace(ref.update_id, foreign.update_id)
        .replace(f'"offset":{high - 1}', f'"offset":{place[1]}')
    )
    (fed.home / "dense" / f"{foreign.update_id}.json").write_text(text)
    with pytest.raises(EnvelopeError, match="base version"):
        fold_dense(fed, replace(ref, update_id=foreign.update_id))


def test_replay_puts_lost_blobs_back(fed):
    """A blob that was deleted and one that was altered are restored from the archived inputs."""
    Device(fed, "ann").send()
    fast_round(fed)
    genesis = set(fed.chain.state().versions[0].blobs.values())
    lost, altered = sorted(set(fed.chain.state().head.blobs.values()) - genesis)[:2]
    Path(fed.blobs.location(lost)).unlink()
    Path(fed.blobs.location(altered)).write_bytes(b"x")
    assert any("restored" in line for line in replay_versions(fed))
    assert fed.blobs.get(lost)
    assert fed.blobs.get(altered)


def test_production_refuses_unverified_decisions(tmp_path):
    """The local example's allow_unverified does not open in production."""
    config = make_workspace(tmp_path, bootstrap="127.0.0.1:9092")
    config.write_text(config.read_text().replace("profile: local", "profile: production"))
    with pytest.raises(ConfigError, match="allow_unverified"):
        open_federation(config)

"""The probe tells an update from its negative, whatever its size, and judges only what would be folded."""

from __future__ import annotations

import numpy as np
import pytest

from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors
from tests.federation import Device, make_federation, random_delta
from tier1.evaluation.probe import cosine, probed
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import decide, settle_candidate
from tier1.loops.gate_candidate import losses_of
from tier1.loops.records import CandidateRef
from tier1.versions.candidates import load_candidate

NAME = "model.layers.0.mlp.experts.down_proj"


def low_rank(rng, scales, rank=2, d_out=5, d_in=4):
    """Return a delta over experts 0, 1, … of NAME, expert i of size `scales[i]`."""
    n = len(scales)
    lora_b = rng.standard_normal((n, d_out, rank)) * np.array(scales)[:, None, None]
    factors = ExpertFactors(
        expert_ids=tuple(range(n)),
        lora_a=rng.standard_normal((n, rank, d_in)).astype(np.float32),
        lora_b=lora_b.astype(np.float32),
    )
    return Delta(spec=AdapterSpec(rank=rank, alpha=3.0), factors={NAME: factors})


def dense(delta):
    return 1.5 * np.matmul(delta.factors[NAME].lora_b, delta.factors[NAME].lora_a, dtype=np.float64)


def test_the_cosine_is_the_dense_one_of_equalised_experts():
    """Guards the formula: ⟨D, ΔW⟩ from factors, every expert at the same norm, over covered experts only."""
    rng = np.random.default_rng(0)
    delta, direction = low_rank(rng, (1.0, 100.0, 1.0)), rng.standard_normal((3, 5, 4))
    matrices = dense(delta)[:2]
    units = matrices / np.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    wanted = (units * direction[:2]).sum() / (np.linalg.norm(units) * np.linalg.norm(direction))
    assert cosine({NAME: direction}, delta, {(0, 0), (0, 1)}) == pytest.approx(wanted, rel=1e-6)


def test_a_huge_part_that_helps_does_not_pay_for_small_ones_that_harm():
    """Guards the equalisation: two experts against the direction and one along it, however long, stay below zero."""
    delta = low_rank(np.random.default_rng(1), (1.0, 1.0, 1e6))
    direction = dense(delta) / np.linalg.norm(dense(delta), axis=(1, 2), keepdims=True)
    direction[:2] *= -1
    everywhere = {(0, 0), (0, 1), (0, 2)}
    assert (direction * dense(delta)).sum() > 0
    assert cosine({NAME: direction}, delta, everywhere) == pytest.approx(-1 / 3, rel=1e-5)
    assert cosine({NAME: direction}, low_rank(np.random.default_rng(1), (0.0, 0.0, 0.0)), everywhere) == 0.0


@pytest.fixture
def fed(tmp_path):
    fed = make_federation(tmp_path, clients=("ann", "bob"), aggregation={"probe": 0.0})
    trained = train_delta(fed, pack_datasets(fed, authorise_training(fed, "r")), "r")
    decide(fed, settle_candidate(fed, fold_dense(fed, trained)), "approve", "flag")
    return fed


def signed(delta, sign):
    factors = {
        name: ExpertFactors(expert_ids=f.expert_ids, lora_a=f.lora_a, lora_b=(sign * f.lora_b).astype(np.float32))
        for name, f in delta.factors.items()
    }
    return Delta(spec=delta.spec, factors=factors)


def test_of_an_update_and_its_negative_one_is_harmful(fed):
    """Guards the step in the loop: what raises the suites' loss is a recorded refusal, what lowers it is folded."""
    delta = random_delta(fed.chain.state().head.snapshot, seed=7, size=0.01, rank=2)
    for client, sign in (("ann", 1.0), ("bob", -1.0)):
        Device(fed, client).send(delta=signed(delta, sign))
    candidate = load_candidate(fed.home, fold_updates(fed, take_updates(fed)).digest)
    (kept,), (refused,) = candidate.accepted, candidate.refused
    assert {kept.client_id, refused.client_id} == {"ann", "bob"}
    assert refused.reason == "harmful"
    assert "got -0.0" in refused.detail
    settled = settle_candidate(fed, save(fed, candidate))
    before, after = (losses_of(fed, fed.chain.state().versions[number]) for number in (1, settled.version))
    assert after["plays"] < before["plays"]


def save(fed, candidate):
    digest = candidate.digest()
    return CandidateRef(digest=digest, parent_version=candidate.parent_version, n_accepted=1, n_refused=1)


def test_the_probe_looks_where_the_fold_of_all_leads(fed, monkeypatch):
    """Guards the place of judgement: the very candidate if nobody is refused, folded anew without who is."""
    judged = []

    def spy(admission, folded, *arguments, **keywords):
        judged.append((folded.blobs, probed(admission, folded, *arguments, **keywords)))
        return judged[-1][1]

    monkeypatch.setattr("tier1.evaluation.probe.probed", spy)
    delta = random_delta(fed.chain.state().head.snapshot, seed=7, size=0.01, rank=2)
    for client, sign in (("ann", 1.0), ("bob", -0.5)):
        Device(fed, client).send(delta=signed(delta, sign))
    candidate = load_candidate(fed.home, fold_updates(fed, take_updates(fed)).digest)
    ((folded, admission),) = judged
    assert len(candidate.accepted) == len(admission.updates) == 1
    assert candidate.blobs != folded
    settle_candidate(fed, save(fed, candidate))
    Device(fed, candidate.accepted[0].client_id, sequence=1).send(
        delta=signed(delta, 1.0 if candidate.accepted[0].client_id == "ann" else -0.5)
    )
    again = load_candidate(fed.home, fold_updates(fed, take_updates(fed)).digest)
    assert judged[-1][0] == again.blobs
    assert not again.refused

from __future__ import annotations

import numpy as np
import pytest

from fednested_lib.snapshot import SLICE_TENSOR, decode_blob, encode_blob
from tests import oracle
from tests.tier1.aggregation.schedules import Run, pipeline_of, random_schedule
from tier1.aggregation import fold, streaming, weights
from tier1.aggregation.gram import Gram
from tier1.versions import build

pytestmark = pytest.mark.usefixtures("many_folds")
N_SCHEDULES = 1000
CHUNKS = 10


def assert_conforms(seed: int) -> None:
    """Run one schedule through the product and compare every version with the oracle, to 1e-6 of the largest weight."""
    schedule = random_schedule(seed)
    run = Run(schedule)
    told = run.go()
    expected, folded = oracle.run(schedule.genesis, told, pipeline_of(schedule))
    versions = run.state().versions
    assert len(versions) == len(expected)
    for number in range(1, len(expected)):
        assert [row.update_id for row in versions[number].accepted] == folded[number]
        found = run.weights(number)
        for key, matrix in expected[number].items():
            assert np.abs(found[key] - matrix).max() <= 1e-6 * np.abs(matrix).max(), (seed, number, key)


def assert_all_conform(seeds: range) -> None:
    for seed in seeds:
        assert_conforms(seed)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_schedules_equal_the_dense_oracle(chunk):
    """Clients, ranks, subsets, staleness, duplicates, order, two sends from one base, every rule: 1,000 schedules."""
    assert_all_conform(range(chunk, N_SCHEDULES, CHUNKS))


def fresh_half(monkeypatch) -> None:
    """The version counter is incremented before the discount, so a fresh update gets 0.5 (NVFlare FedBuff)."""
    monkeypatch.setattr(weights, "discount", lambda tau, _settings: 1 / (1 + (tau + 1) ** 0.5))


def renormalised(monkeypatch) -> None:
    """Staleness only shifts weight inside the buffer; a uniformly stale buffer takes a full step."""
    original = weights.mass
    monkeypatch.setattr(
        weights, "mass", lambda c, t, _p, s: original(c, t, weights.counted_tokens(c, t, s.token_cap), s)
    )


def separate_means(monkeypatch) -> None:
    """A and B are averaged separately (FedIT, FlowerTune, the default of NVFlare)."""

    def mean(weight, terms):
        rank, total = max(len(a) for _, a, _ in terms), sum(c for c, *_ in terms)
        mean_a = sum(c / total * np.pad(a, ((0, rank - len(a)), (0, 0))) for c, a, _ in terms)
        mean_b = sum(c / total * np.pad(b, ((0, 0), (0, rank - b.shape[1]))) for c, _, b in terms)
        return (weight + total * mean_b @ mean_a).astype(np.float32)

    monkeypatch.setattr(fold, "fold_matrix", mean)


def full_weights(monkeypatch) -> None:
    """Clients' full weights are added instead of their deltas (FedML async)."""
    original = build.fold_experts

    def added(blobs, updates, *, eta, store):
        folded = original(blobs, updates, eta=eta, store=store)
        for key in folded:
            total = sum(update.weights.get(oracle.place_of(key), 0.0) for update in updates)
            if total:
                before, after = (decode_blob(store.get(b[key]))[SLICE_TENSOR] for b in (blobs, folded))
                moved = (after + eta * total * before).astype(np.float32)
                folded[key] = store.put(encode_blob({SLICE_TENSOR: moved}))
        return folded

    monkeypatch.setattr(build, "fold_experts", added)


def against_current(monkeypatch) -> None:
    """A stale client's delta is taken against the current global instead of its base (APPFL FedBuff)."""
    original = build.fold_candidate

    def drifted(parent, inputs, admission, **arguments):
        candidate = original(parent, inputs, admission, **arguments)
        store, views = arguments["blobs"], {view.version: view for view in parent.lineage()}
        moved = dict(candidate.blobs)
        for row in candidate.accepted:
            for key, digest in moved.items():
                base, current = (
                    decode_blob(store.get(view.blobs[key]))[SLICE_TENSOR] for view in (views[row.base_version], parent)
                )
                drift = arguments["rates"].eta_t2 * row.weight * (base - current)
                if drift.any():
                    matrix = decode_blob(store.get(digest))[SLICE_TENSOR] + drift
                    moved[key] = store.put(encode_blob({SLICE_TENSOR: matrix.astype(np.float32)}))
        return candidate.model_copy(update={"blobs": moved})

    monkeypatch.setattr(Run.go, "__defaults__", (drifted,))


def fp32_distances(monkeypatch) -> None:
    """Distances are ‖x‖² + ‖y‖² − 2x·y in the updates' own fp32 (Flower's Multi-Krum)."""

    def cancelled(terms, _root=None):
        x = np.stack([(np.float32(s) * b @ a).ravel() for s, a, b in terms])
        inner = x @ x.T
        squares = np.diag(inner)
        distance2 = np.maximum(squares[:, None] + squares[None, :] - 2 * inner, 0)
        return Gram(inner=inner.astype(np.float64), distance2=distance2.astype(np.float64))

    monkeypatch.setattr(streaming, "matrix_gram", cancelled)


PEERS = [fresh_half, renormalised, separate_means, full_weights, against_current, fp32_distances]


@pytest.mark.parametrize("bug", PEERS, ids=lambda bug: bug.__name__)
def test_the_suite_goes_red_for_the_formula_of_a_peer(bug, monkeypatch):
    """Every aggregation bug that a peer shipped, planted in the product, turns the same suite red."""
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        assert_all_conform(range(60))

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fednested_lib.blobs import BlobStore
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, squared_norm
from fednested_lib.errors import SnapshotError, StorageError
from fednested_lib.partition import expert_name, expert_param
from fednested_lib.snapshot import SLICE_TENSOR, decode_blob, encode_blob, slice_key
from tier1.aggregation.fold import WeightedUpdate, fold_experts, magnitude, one_thread
from tier1.aggregation.spool import FactorSpool
from tier1.aggregation.weights import clip_factor, weigh
from tier1.versions.settings import AggregationSettings

N_EXPERTS = 5
SHAPES = {
    expert_name(layer, projection): (N_EXPERTS, *shape)
    for layer in range(2)
    for projection, shape in (("gate_up_proj", (18, 7)), ("down_proj", (7, 9)))
}
SETTINGS = AggregationSettings(max_norm=3.0, min_mass_tokens=50, token_cap=500)
Weights = dict[str, np.ndarray]  # slice key -> matrix


@dataclass(frozen=True, kw_only=True)
class Client:
    """One update of the buffer; `tokens` per expert id, the same in every layer."""

    update_id: str
    tokens: dict[int, int]
    staleness: int
    delta: Delta


def random_client(rng: np.random.Generator, i: int) -> Client:
    """Draw a ragged update: any subset of experts, any rank, any staleness, some experts withheld."""
    experts = tuple(sorted(rng.choice(N_EXPERTS, size=rng.integers(1, N_EXPERTS + 1), replace=False).tolist()))
    rank = int(rng.integers(1, 6))
    factors = {
        name: ExpertFactors(
            expert_ids=experts,
            lora_a=rng.normal(size=(len(experts), rank, d_in)).astype(np.float32),
            lora_b=rng.normal(0, 0.3, size=(len(experts), d_out, rank)).astype(np.float32),
        )
        for name, (_, d_out, d_in) in SHAPES.items()
    }
    return Client(
        update_id=f"{rng.integers(1 << 62):016x}{i:048x}",
        tokens={expert: int(rng.choice([0, 16, 128, 1024])) for expert in experts},
        staleness=int(rng.integers(0, 9)),
        delta=Delta(spec=AdapterSpec(rank=rank, alpha=float(rng.uniform(1, 8))), factors=factors),
    )


def random_buffer(seed: int, n: int = 7) -> tuple[Weights, list[Client]]:
    """Draw weights and a buffer of updates."""
    rng = np.random.default_rng(seed)
    weights = {
        slice_key(name, expert): rng.normal(size=shape[1:]).astype(np.float32)
        for name, shape in SHAPES.items()
        for expert in range(shape[0])
    }
    return weights, [random_client(rng, i) for i in range(n)]


def store_weights(weights: Weights, store: BlobStore) -> dict[str, str]:
    """Store matrices as expert slices."""
    return {key: store.put(encode_blob({SLICE_TENSOR: matrix})) for key, matrix in weights.items()}


def covered(client: Client) -> dict[tuple[int, int], int]:
    """Return tokens per (layer, expert)."""
    return {(layer, expert): count for layer in range(2) for expert, count in client.tokens.items()}


def fold_digests(blobs: dict[str, str], clients: Sequence[Client], eta: float, store: BlobStore) -> dict[str, str]:
    """Run the product's clip, weigh and fold."""
    clips = [clip_factor(magnitude(c.delta, covered(c))[0], SETTINGS.max_norm) for c in clients]
    names = [c.update_id for c in clients]
    weights = weigh(names, [covered(c) for c in clients], [c.staleness for c in clients], clips, SETTINGS).weights
    with FactorSpool() as spool:
        updates = []
        for client, row in zip(clients, weights, strict=True):
            spool.add(client.update_id, client.delta)

            def read(param, expert, update_id=client.update_id):
                return spool.read(update_id, param, expert)

            updates.append(
                WeightedUpdate(
                    update_id=client.update_id,
                    client_id=client.update_id,
                    scale=client.delta.spec.scale,
                    weights=row,
                    factors=read,
                )
            )
        return fold_experts(blobs, updates, eta=eta, store=store)


def product(tmp_path) -> Callable[[Weights, Sequence[Client], float], Weights]:
    """Return the product's fold as a function of matrices."""
    store = BlobStore(tmp_path / "blobs")

    def aggregate(weights: Weights, clients: Sequence[Client], eta: float) -> Weights:
        folded = fold_digests(store_weights(weights, store), clients, eta, store)
        return {key: decode_blob(store.get(digest))[SLICE_TENSOR] for key, digest in folded.items()}

    return aggregate


def dense_of(client: Client, param: str, expert: int) -> np.ndarray:
    """Return s·B·A in fp64."""
    factors = client.delta.factors[param]
    i = factors.expert_ids.index(expert)
    return client.delta.spec.scale * factors.lora_b[i].astype(np.float64) @ factors.lora_a[i].astype(np.float64)


def oracle(
    weights: Weights,
    clients: Sequence[Client],
    eta: float,
    discount: Callable[[int], float] = lambda tau: (1 + tau) ** -0.5,
    renormalise: bool = False,
) -> Weights:
    """DESIGN §4 with dense fp64 matrices and nothing of the product; the last two arguments plant bugs."""
    clips = []
    for client in clients:
        matrices = [dense_of(client, name, e) for name in SHAPES for e, count in client.tokens.items() if count > 0]
        norm = np.sqrt(sum((matrix**2).sum() for matrix in matrices))
        clips.append(min(1.0, SETTINGS.max_norm / norm) if norm > 0 else 1.0)
    result = {}
    for key, weight in weights.items():
        param, expert = key.rsplit("/", 1)
        expert = int(expert)
        members = [(c, k) for c, k in zip(clients, clips, strict=True) if c.tokens.get(expert, 0) > 0]
        step = np.zeros(weight.shape)
        if members:
            capped = np.array([min(c.tokens[expert], SETTINGS.token_cap) for c, _ in members], dtype=np.float64)
            p = capped * np.array([discount(c.staleness) for c, _ in members])
            total = capped.sum() if renormalise else p.sum()
            mass = min(1, len(members) / SETTINGS.min_coverage) * total / max(capped.sum(), SETTINGS.min_mass_tokens)
            for (client, k), share in zip(members, p / p.sum(), strict=True):
                step += k * share * mass * dense_of(client, param, expert)
        result[key] = weight + eta * step
    return result


def assert_conforms(aggregate: Callable[[Weights, Sequence[Client], float], Weights], seeds=range(6)) -> None:
    """Compare an aggregation with the oracle on random ragged buffers."""
    for seed in seeds:
        weights, clients = random_buffer(seed)
        expected = oracle(weights, clients, 0.7)
        found = aggregate(weights, clients, 0.7)
        for key in expected:
            np.testing.assert_allclose(found[key], expected[key], rtol=3e-7, atol=1e-7, err_msg=key)


def test_fold_equals_the_dense_oracle(tmp_path):
    """The stacked fold is the formula: mixed ranks, ragged experts, withheld experts, stale and clipped clients."""
    assert_conforms(product(tmp_path))


def fedit(weights: Weights, clients: Sequence[Client], eta: float) -> Weights:
    """Bug: A and B are averaged separately (FedIT, FlowerTune, the default of NVFlare)."""
    result = oracle(weights, clients, 0.0)
    for key in weights:
        param, expert = key.rsplit("/", 1)
        members = [c for c in clients if c.tokens.get(int(expert), 0) > 0]
        rank = max((c.delta.spec.rank for c in members), default=0)
        if rank:
            mean_a, mean_b = 0.0, 0.0
            for client in members:
                factors = client.delta.factors[param]
                i, pad = factors.expert_ids.index(int(expert)), rank - client.delta.spec.rank
                mean_a = mean_a + np.pad(factors.lora_a[i], ((0, pad), (0, 0))) / len(members)
                mean_b = mean_b + client.delta.spec.scale * np.pad(factors.lora_b[i], ((0, 0), (0, pad))) / len(members)
            result[key] = weights[key] + eta * mean_b @ mean_a
    return result


def fresh_half(weights: Weights, clients: Sequence[Client], eta: float) -> Weights:
    """Bug: the version counter is incremented before the discount, so a fresh update gets 0.5 (NVFlare FedBuff)."""
    return oracle(weights, clients, eta, discount=lambda tau: 1 / (1 + (tau + 1) ** 0.5))


def full_weights(weights: Weights, clients: Sequence[Client], eta: float) -> Weights:
    """Bug: clients' full weights are added instead of their deltas (FedML async)."""
    result = oracle(weights, clients, eta)
    touched = {e for c in clients for e, count in c.tokens.items() if count > 0}
    return {k: m + eta * weights[k] if int(k.rsplit("/", 1)[1]) in touched else m for k, m in result.items()}


def against_current(weights: Weights, clients: Sequence[Client], eta: float) -> Weights:
    """Bug: a stale client's delta is taken against the current global instead of its base (APPFL FedBuff)."""
    result = oracle(weights, clients, eta)
    stale = {e for c in clients if c.staleness for e, count in c.tokens.items() if count > 0}
    drift = {key: 0.01 * np.sign(matrix) for key, matrix in weights.items()}  # current − base
    return {k: m - eta * drift[k] if int(k.rsplit("/", 1)[1]) in stale else m for k, m in result.items()}


def renormalised(weights: Weights, clients: Sequence[Client], eta: float) -> Weights:
    """Bug: staleness only shifts weight inside the buffer; a uniformly stale buffer takes a full step."""
    return oracle(weights, clients, eta, renormalise=True)


@pytest.mark.parametrize("bug", [fedit, fresh_half, full_weights, against_current, renormalised])
def test_conformance_check_catches_the_bugs_of_peers(bug):
    """Every aggregation bug that a peer framework shipped turns the conformance check red."""
    with pytest.raises(AssertionError):
        assert_conforms(bug)


def test_one_client_gives_its_own_delta(tmp_path):
    """With one fresh client of enough tokens and η = 1, W becomes W + (α/r)·B·A."""
    weights, clients = random_buffer(1, n=1)
    client = clients[0]
    small = {
        name: ExpertFactors(expert_ids=f.expert_ids, lora_a=f.lora_a, lora_b=f.lora_b * np.float32(0.01))
        for name, f in client.delta.factors.items()
    }
    tokens = dict.fromkeys(client.tokens, 128)
    delta = Delta(spec=client.delta.spec, factors=small)
    client = Client(update_id=client.update_id, tokens=tokens, staleness=0, delta=delta)
    folded = product(tmp_path)(weights, [client], 1.0)
    for name in SHAPES:
        for expert in tokens:
            key = slice_key(name, expert)
            np.testing.assert_allclose(folded[key] - weights[key], dense_of(client, name, expert), atol=3e-7)


def test_order_of_arrival_does_not_show_in_a_single_bit(tmp_path):
    """The same buffer in any order gives the same blob digests."""
    store = BlobStore(tmp_path)
    weights, clients = random_buffer(2, n=8)
    blobs = store_weights(weights, store)
    expected = fold_digests(blobs, clients, 1.0, store)
    for seed in range(4):
        shuffled = [clients[i] for i in np.random.default_rng(seed).permutation(len(clients))]
        assert fold_digests(blobs, shuffled, 1.0, store) == expected


def test_stacking_order_is_that_of_the_ids(tmp_path):
    """Where the sum itself depends on the order (1e20 − 1e20 + 1), it is that of the update ids, whoever came first."""
    store = BlobStore(tmp_path)
    key = f"{expert_name(0, 'down_proj')}/0"
    blobs = store_weights({key: np.zeros((7, 9), np.float32)}, store)

    def one(update_id: str, value: float) -> WeightedUpdate:
        a, b = np.full((1, 9), abs(value), np.float32), np.full((7, 1), value, np.float32)
        return WeightedUpdate(
            update_id=update_id, client_id=update_id, scale=1.0, weights={(0, 0): 1.0}, factors=lambda *_: (a, b)
        )

    updates = [one("a", 1e10), one("b", -1e10), one("c", 1.0)]
    digests = {
        fold_experts(blobs, [updates[i] for i in order], eta=1.0, store=store)[key]
        for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0))
    }
    assert len(digests) == 1


def test_fold_runs_on_one_thread_and_puts_the_setting_back(tmp_path, monkeypatch):
    """BLAS may round differently on more threads, so every product is made on one, whatever torch is set to."""
    store = BlobStore(tmp_path)
    weights, clients = random_buffer(3)
    seen, addmm = set(), torch.Tensor.addmm_

    def spy(*operands):
        seen.add(torch.get_num_threads())
        return addmm(*operands)

    monkeypatch.setattr(torch.Tensor, "addmm_", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fold_digests(store_weights(weights, store), clients, 1.0, store)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


def test_threads_are_put_back_after_an_error():
    """A fold that fails leaves torch's thread count as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def fail():
        with one_thread():
            raise RuntimeError

    try:
        with pytest.raises(RuntimeError):
            fail()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_eta_zero_changes_nothing(tmp_path):
    """η = 0 gives the parent's digests and writes no blob."""
    store = BlobStore(tmp_path)
    weights, clients = random_buffer(4)
    blobs = store_weights(weights, store)
    stored = set(store.digests())
    assert fold_digests(blobs, clients, 0.0, store) == blobs
    assert set(store.digests()) == stored


def test_untouched_expert_keeps_its_blob(tmp_path):
    """An expert that no client covers, or covers with zero tokens only, keeps its digest and is not even read."""
    store = BlobStore(tmp_path)
    weights, clients = random_buffer(5, n=3)
    clients = [Client(update_id=c.update_id, tokens={**c.tokens, 2: 0}, staleness=0, delta=c.delta) for c in clients]
    blobs = {**store_weights(weights, store), **{slice_key(name, 2): "f" * 64 for name in SHAPES}}
    folded = fold_digests(blobs, clients, 1.0, store)
    touched = {e for c in clients for e, count in c.tokens.items() if count > 0}
    for key in blobs:
        assert (folded[key] == blobs[key]) == (int(key.rsplit("/", 1)[1]) not in touched), key


def test_fold_moves_no_expert_set_by_more_than_the_clip_bound(tmp_path):
    """However large a hostile update is, the step's Frobenius norm stays within η·C."""
    weights, clients = random_buffer(6, n=1)
    huge = {
        name: ExpertFactors(
            expert_ids=f.expert_ids, lora_a=f.lora_a * np.float32(1e18), lora_b=f.lora_b * np.float32(1e18)
        )
        for name, f in clients[0].delta.factors.items()
    }
    delta = Delta(spec=AdapterSpec(rank=clients[0].delta.spec.rank, alpha=1e30), factors=huge)
    tokens = dict.fromkeys(clients[0].tokens, 1024)
    hostile = Client(update_id="a" * 64, tokens=tokens, staleness=0, delta=delta)
    folded = product(tmp_path)(weights, [hostile], 1.0)
    step = np.sqrt(sum(((folded[k] - weights[k]).astype(np.float64) ** 2).sum() for k in weights))
    assert 0.99 * SETTINGS.max_norm < step <= SETTINGS.max_norm * (1 + 1e-5)


def test_magnitude_is_the_dense_norm():
    """The norm from factors equals the norm of the dense delta over covered experts; reach bounds it from above."""
    _, clients = random_buffer(7, n=5)
    for client in clients:
        dense = [dense_of(client, name, e) for name in SHAPES for e, n in client.tokens.items() if n > 0]
        norm, reach = magnitude(client.delta, covered(client))
        assert norm == pytest.approx(np.sqrt(sum((m**2).sum() for m in dense)), rel=1e-12)
        assert reach >= norm


def test_magnitude_agrees_with_the_contract():
    """With every expert covered, the norm is the one that the device computes (`delta.squared_norm`)."""
    client = random_buffer(8, n=1)[1][0]
    everything = {(expert_param(name)[0], e): 1 for name, f in client.delta.factors.items() for e in f.expert_ids}
    expected = sum(squared_norm(f, client.delta.spec.scale).sum() for f in client.delta.factors.values())
    assert magnitude(client.delta, everything)[0] ** 2 == pytest.approx(expected, rel=1e-12)


def test_corrupt_parent_blob_is_named(tmp_path):
    """One changed byte in a parent's blob stops the fold and names slice and digest."""
    store = BlobStore(tmp_path)
    weights, clients = random_buffer(9)
    blobs = store_weights(weights, store)
    touched = next(e for c in clients for e, count in c.tokens.items() if count > 0)
    key = slice_key(next(iter(SHAPES)), touched)
    path = Path(store.location(blobs[key]))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(SnapshotError, match=f"slice {key}.*{blobs[key]}"):
        fold_digests(blobs, clients, 1.0, store)


def test_spool_reads_what_was_added_and_leaves_nothing(tmp_path):
    """Factors come back bit by bit, and the scratch directory is gone afterwards."""
    _, clients = random_buffer(10, n=2)
    with FactorSpool(str(tmp_path)) as spool:
        for client in clients:
            spool.add(client.update_id, client.delta)
        for client in clients:
            for name, factors in client.delta.factors.items():
                for i, expert in enumerate(factors.expert_ids):
                    a, b = spool.read(client.update_id, name, expert)
                    assert np.array_equal(a, factors.lora_a[i])
                    assert np.array_equal(b, factors.lora_b[i])
    assert list(tmp_path.iterdir()) == []


def test_full_scratch_disk_is_one_line(tmp_path):
    """A scratch directory that cannot take the factors is a StorageError that names path and size."""
    client = random_buffer(11, n=1)[1][0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FactorSpool(str(tmp_path)) as spool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        try:
            with pytest.raises(StorageError, match=r"cannot spool \d+ bytes to .*"):
                spool.add(client.update_id, client.delta)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(StorageError, match="missing"), FactorSpool(str(tmp_path / "missing")):
        pass

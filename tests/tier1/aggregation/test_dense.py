from __future__ import annotations

import numpy as np
import pytest

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import PayloadError, SnapshotError
from fednested_lib.snapshot import SLICE_TENSOR, decode_blob, encode_blob
from tier1.aggregation.dense import fold_dense_blobs

EXPERT = "model.layers.0.mlp.experts.down_proj/1"
ROUTER = "model.layers.0.mlp.gate.weight"


@pytest.fixture
def stores(tmp_path):
    return BlobStore(tmp_path / "blobs"), BlobStore(tmp_path / "payloads")


def arrays(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Return slices: one core shard with a router tensor in it, another core shard, one expert."""
    rng = np.random.default_rng(seed)
    return {
        "core/layers.0": {
            "attention": rng.normal(size=(3, 4)).astype(np.float32),
            ROUTER: rng.normal(size=(2, 3)).astype(np.float32),
        },
        "core/rest": {"embedding": rng.normal(size=(5, 3)).astype(np.float32)},
        EXPERT: {SLICE_TENSOR: rng.normal(size=(3, 2)).astype(np.float32)},
    }


def put(slices, store: BlobStore) -> dict[str, str]:
    return {key: store.put(encode_blob(tensors)) for key, tensors in slices.items()}


def fold(stores, base, delta, eta_core=0.5, eta_t1=0.25):
    blobs, payloads = stores
    digests, states = fold_dense_blobs(
        base, [(1.0, delta)], eta_core=eta_core, eta_t1=eta_t1, store=blobs, archive=payloads
    )
    assert not states
    return digests, {key: decode_blob(blobs.get(digest)) for key, digest in digests.items()}


def test_core_router_and_experts_take_their_own_step(stores):
    """W_core += η_core·Δ, router included, as it trains with the core; W_experts += η_T1·Δ; added, not subtracted."""
    base, delta = arrays(0), arrays(1)
    _, folded = fold(stores, put(base, stores[0]), put(delta, stores[1]))
    for key, tensors in base.items():
        eta = 0.25 if key == EXPERT else 0.5
        for name, weight in tensors.items():
            np.testing.assert_allclose(folded[key][name], weight + eta * delta[key][name].astype(np.float64), rtol=1e-7)


def test_slices_without_a_delta_keep_their_blob(stores):
    """An absent slice, an all-zero slice and η = 0 leave the digest as it is."""
    base = put(arrays(0), stores[0])
    zeros = {name: np.zeros_like(array) for name, array in arrays(0)["core/layers.0"].items()}
    delta = put({"core/layers.0": zeros, EXPERT: arrays(1)[EXPERT]}, stores[1])
    digests, _ = fold(stores, base, delta)
    assert {key for key in base if digests[key] != base[key]} == {EXPERT}
    assert fold(stores, base, put(arrays(1), stores[1]), eta_core=0.0, eta_t1=0.0)[0] == base


def test_delta_is_additive_on_a_newer_head(stores):
    """Two deltas folded one after the other give the same sum in either order, up to one rounding of fp32."""
    base = put(arrays(0), stores[0])
    first, second = put(arrays(1), stores[1]), put(arrays(2), stores[1])
    one_way = fold(stores, fold(stores, base, first)[0], second)[1]
    other_way = fold(stores, fold(stores, base, second)[0], first)[1]
    for key, tensors in one_way.items():
        for name, array in tensors.items():
            np.testing.assert_allclose(array, other_way[key][name], rtol=3e-7, atol=1e-7)


def test_delta_that_does_not_fit_is_refused(stores):
    """An unknown slice, other tensors, other shapes and a result that is not finite are errors that name the slice."""
    base = put(arrays(0), stores[0])

    def refused(reason, match, slices):
        with pytest.raises(PayloadError, match=match) as caught:
            fold(stores, base, put(slices, stores[1]))
        assert caught.value.reason == reason

    refused("bad_tensors", "core/layers.7", {"core/layers.7": arrays(1)["core/rest"]})
    refused("bad_shape", "core/rest", {"core/rest": {"other": np.ones((5, 3), np.float32)}})
    refused("bad_shape", "core/rest", {"core/rest": {"embedding": np.ones((5, 4), np.float32)}})
    refused("non_finite", "embedding", {"core/rest": {"embedding": np.full((5, 3), np.nan, np.float32)}})


def test_missing_delta_slice_is_named(stores):
    """A delta blob that is gone from the archive names slice and digest."""
    base = put(arrays(0), stores[0])
    with pytest.raises(SnapshotError, match=f"slice core/rest.*{'a' * 64}"):
        fold(stores, base, {"core/rest": "a" * 64})

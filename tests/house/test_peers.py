"""The benchmark beside peers measures what it says, and says so when it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.aggregation import bench, environment, krum
from benchmarks.aggregation.ours import Federation
from benchmarks.aggregation.workload import LARGE, Shape, make_delta, read, write
from fednested_lib.delta import Delta, encode
from fednested_lib.log import InMemoryLog

TINY = Shape(layers=2, experts=4, last=3, hidden=12, width=8, rank=2)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path, TINY, 3, InMemoryLog(name="bench"))
    yield made
    made.close()


def averages(deltas: list[Delta]) -> bench.Averages:
    """What a peer returns: the mean of every factor."""
    return {
        f"{name}|{factor}|{row}": np.mean([getattr(d.factors[name], factor)[row] for d in deltas], axis=0)
        for name, factors in deltas[0].factors.items()
        for row in range(len(factors.expert_ids))
        for factor in ("lora_a", "lora_b")
    }


def test_the_large_workload_is_the_adapter_of_the_claim():
    """12,008 tensors and about 107 MB of fp32, as issue 3 and the README say."""
    assert LARGE.n_tensors == 12_008
    assert abs(LARGE.fp32_bytes / 1e6 - 107) < 0.5


def test_both_sides_read_the_same_numbers(tmp_path: Path):
    """Split by expert, the file holds as many tensors and bytes as the shape says, and our side reads it to the bit."""
    write(TINY, 1, tmp_path / "client.npz")
    with np.load(tmp_path / "client.npz") as stored:
        assert sum(len(stored[name]) for name in stored.files) == TINY.n_tensors
        assert sum(stored[name].nbytes for name in stored.files) == TINY.fp32_bytes
    back, made = read(TINY, tmp_path / "client.npz"), make_delta(TINY, 1)
    assert encode(back, encoding="fp32", seed=0) == encode(made, encoding="fp32", seed=0)


@pytest.mark.parametrize(("encoding", "bound"), [("int8", 0.27), ("int4", 0.14)])
def test_bytes_keep_to_their_share_of_fp32(encoding: str, bound: float):
    """One layer of the large workload: scales, block padding and header included."""
    layer = replace(LARGE, layers=1, experts=32, last=32)
    assert len(encode(make_delta(layer, 0), encoding=encoding, seed=0)) <= bound * layer.fp32_bytes


def test_our_side_is_checked_before_it_is_timed(federation: Federation):
    """The whole path folds the mean of the updates, and a wrong mean is noticed."""
    deltas = [make_delta(TINY, client) for client in range(3)]
    bench.check_ours(federation, deltas)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "product", lambda delta, name, row: 1.001 * np.ones(TINY.params[name][1:]))
        with pytest.raises(bench.NotEqual, match="from the mean of the updates"):
            bench.check_ours(federation, deltas)


def test_a_peer_is_checked_before_it_is_timed(federation: Federation):
    """A peer's averages pass, one wrong number or one missing tensor does not; int8 keeps to its bound."""
    deltas = [make_delta(TINY, client) for client in range(2)]
    found = averages(deltas)
    bench.check_averages(deltas, found, TINY.n_tensors)
    assert 0 < bench.check_one_client(federation, deltas[0], averages(deltas[:1])) <= 1
    key = next(iter(found))
    with pytest.raises(bench.NotEqual, match="not the mean"):
        bench.check_averages(deltas, found | {key: found[key] * 1.001}, TINY.n_tensors)
    with pytest.raises(bench.NotEqual, match="tensors of"):
        bench.check_averages(deltas, {key: found[key]}, TINY.n_tensors)
    with pytest.raises(bench.NotEqual, match="int8 moved"):
        bench.check_one_client(federation, make_delta(TINY, 9), averages(deltas[:1]))


def test_averaging_factors_is_another_function(federation: Federation):
    """The error of FedAvg on A and B is zero for one client and large for two."""
    deltas = [make_delta(TINY, client) for client in range(2)]
    assert bench.factor_error(deltas[:1], averages(deltas[:1]), TINY) < 1e-6
    assert bench.factor_error(deltas, averages(deltas), TINY) > 0.5


def test_a_client_that_sends_nan_is_refused(federation: Federation):
    """Well-formed, signed, all NaN: no number of the model changes to NaN, and the reason is recorded."""
    assert bench.nans(federation, [make_delta(TINY, client) for client in range(3)]) == (0, ["non_finite"])


def test_krum_keeps_what_its_definition_keeps():
    """On near-equal updates too; and never a hostile one."""
    for spread in (0.1, 1e-3):
        deltas = krum.buffer(3, spread)
        assert krum.ours(deltas) == krum.referee(deltas) < krum.CLIENTS - krum.HOSTILE


def test_a_missing_peer_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without the package index a row is in error and says what to do; nothing passes."""
    monkeypatch.setenv("FEDNESTED_PEERS", str(tmp_path))
    monkeypatch.setattr(environment.sys, "executable", "/bin/false")
    with pytest.raises(environment.PeerMissing, match="connect the package index, or set FEDNESTED_PEERS") as raised:
        environment.interpreter("flwr")
    assert "\n" not in str(raised.value)

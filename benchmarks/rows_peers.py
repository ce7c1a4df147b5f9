"""The same updates through peers: bytes, speed and what one broken client does (issue 3, items 6 and 7).

flwr 1.42.0 and NVFlare 2.9.0 run in environments of their own (`aggregation/environment.py`); without them a row is in
error and says the remedy. Sides are timed in turn in one run, after their results were compared; `python -m
benchmarks.aggregation` prints all phases.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from benchmarks.aggregation import krum
from benchmarks.aggregation.bench import (
    NotEqual,
    SideBySide,
    averages_of,
    check_averages,
    check_ours,
    nans,
    round_seconds,
    scene,
    side_by_side,
)
from benchmarks.aggregation.deployment import Deployment
from benchmarks.aggregation.worker import Worker
from benchmarks.aggregation.workload import LARGE, SMALL, make_delta
from benchmarks.registry import Reading, figure
from fednested_lib.delta import Delta, Encoding, encode

REPEATS = 5
CLIENTS = 2  # of the sides that are averaged in one process


@cache
def large() -> SideBySide:
    """Time every side but the deployment at the 12,008-tensor shape."""
    return side_by_side(LARGE, CLIENTS, REPEATS)


def share(encoding: Encoding) -> float:
    """Return the payload's bytes as a percentage of the same factors in fp32."""
    return 100 * len(encode(make_delta(LARGE, 0), encoding=encoding, seed=0)) / LARGE.fp32_bytes


@figure("encode.int8_bytes", unit="%", bound="<= 27")
def int8_bytes() -> float:
    """Payload of a 12,008-tensor adapter (106.8 MB of fp32) in int8, of its fp32 bytes."""
    return share("int8")


@figure("encode.int4_bytes", unit="%", bound="<= 14")
def int4_bytes() -> float:
    """Payload of a 12,008-tensor adapter (106.8 MB of fp32) in 4 bits, of its fp32 bytes."""
    return share("int4")


@figure("peers.flwr_speedup", unit="x", bound=">= 10", cls="long")
def flwr_speedup() -> Reading:
    """Encode to aggregate of a 12,008-tensor adapter: flwr 1.42's SuperLink and SuperNode over fednested."""
    found = []
    with scene(LARGE, 1) as (federation, deltas, paths), Deployment(paths) as deployment:
        check_ours(federation, deltas)
        for _ in range(REPEATS):
            mine = federation.run(deltas, "int8").total_s
            found.append(sum(round_seconds(deployment.round(), LARGE).values()) / mine)
    return Reading.of(found)


@figure("peers.flwr_in_process", unit="x", cls="long")
def flwr_in_process() -> Reading:
    """The same where flwr only serialises and averages, in one process, no network; fednested whole, to disk."""
    return Reading.of(large().ratios("flwr in one process", "fednested int8"))


@figure("peers.nvflare_averaging", unit="x", cls="long")
def nvflare_averaging() -> Reading:
    """NVFlare 2.9's averaging of A and B alone, in memory, over fednested's whole path of the same two adapters."""
    run = large()
    if run.absent:
        raise RuntimeError(next(iter(run.absent.values())))
    return Reading.of(run.ratios("NVFlare averaging", "fednested int8"))


@figure("peers.flwr_factor_error", unit="%", cls="long")
def flwr_factor_error() -> float:
    """Distance of flwr's product of averaged A and B from the mean of two updates, of that mean's norm."""
    return 100 * large().factor_error


@figure("peers.flwr_nan", unit="1", cls="full")
def flwr_nan() -> float:
    """NaN among flwr FedAvg's 557,056 numbers if every number of one client of four is NaN; fednested: 0, refused."""
    with scene(SMALL, 4) as (federation, deltas, paths), Worker("flwr", paths) as flwr:
        flwr.ask("fedavg")
        check_averages(deltas, averages_of(flwr, paths[0].with_name("flwr.npz")), SMALL.n_tensors)
        own, reasons = nans(federation, deltas)
        if (own, reasons) != (0, ["non_finite"]):
            raise NotEqual(f"fednested let {own} NaN in and refused for {reasons}")
        return float(flwr.ask("nan")["nan"])


@contextmanager
def krums() -> Iterator[Callable[[list[Delta]], tuple[int, float]]]:
    """Yield a function: updates → (client that flwr's Krum keeps, seconds it takes)."""
    with tempfile.TemporaryDirectory() as directory, Worker("flwr", []) as flwr:

        def keep(deltas: list[Delta]) -> tuple[int, float]:
            flwr.ask(" ".join(["load", *map(str, krum.write(deltas, Path(directory)))]))
            took = flwr.ask(f"krum {krum.HOSTILE}")["seconds"]["aggregate"]
            return krum.kept(averages_of(flwr, Path(directory) / "kept.npz"), deltas), took

        yield keep


@figure("peers.flwr_krum", unit="x", cls="full")
def flwr_krum() -> Reading:
    """Krum of seven updates of 4 layers × 8 experts: flwr's on products over ours on factors; both keep the same."""
    found = []
    with krums() as keep:
        for seed in range(REPEATS):
            deltas = krum.buffer(seed, 0.1)
            kept, theirs = keep(deltas)
            began = time.perf_counter()
            mine = krum.ours(deltas)
            found.append(theirs / (time.perf_counter() - began))
            if not kept == mine == krum.referee(deltas):
                raise NotEqual(f"of buffer {seed} flwr's Krum keeps {kept}, ours {mine}: not what its definition says")
    return Reading.of(found)


@figure("peers.flwr_krum_wrong", unit="1", cls="full")
def flwr_krum_wrong() -> float:
    """Buffers, of ten whose updates differ by 1e-3, where flwr's fp32 Krum keeps another than Krum does; ours: none."""
    wrong = 0
    with krums() as keep:
        for seed in range(10):
            deltas = krum.buffer(seed, 1e-3)
            right = krum.referee(deltas)
            if krum.ours(deltas) != right:
                raise NotEqual(f"our Krum keeps {krum.ours(deltas)} of buffer {seed}, its definition {right}")
            wrong += keep(deltas)[0] != right
    return float(wrong)

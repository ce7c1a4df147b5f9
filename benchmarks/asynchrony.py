"""Does asynchrony pay? The whole product on a virtual clock, both ways.

    python -m benchmarks.asynchrony [KIND ...] [SEED ...]

Everything but the time is real (`small_federation.py`). The two ways differ in nothing but `window.min_updates` and in
whom a device waits for:

    synchronous     K = 16, all devices; a device that has sent waits for the next version
    asynchronous    K = 4, the default; it starts again at once from the champion

Step sizes, staleness weights, clip and gate are the product's defaults in both; local steps, text, seeds and the
duration of the k-th update of each device are the same. Folding takes no virtual time in either. The figure is the
virtual time after which `ROUNDS` synchronous rounds have lowered the held-out loss, over the time at which the
asynchronous federation first has a champion as good.

Durations: `steps` is what NVFlare's edge example simulates (examples/advanced/edge/README.md): a third of the devices
each with Gaussian 100 ± 1, 200 ± 2 and 400 ± 4 s per local update, and 5 s of communication; `heavy_tail` is lognormal
with σ = 1.5 and median 100 s. Both are drawn anew for every update.

A local update is small, five steps of four rows, as in federations that need many rounds. The less is left to learn
after one, the less asynchrony gains, because what a stale update says the versions since have learnt already: larger
local updates gain less. And rounds of sixteen bear larger steps than buffers of four: `steps_tuned` is `steps` where
each way has the best of `ETAS` for η_T2 rather than the default 1 for both.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import structlog

from benchmarks.small_federation import SEQ_LEN, SmallFederation
from benchmarks.virtual_clock import Duration, play
from tier1.versions.settings import Rates

SEEDS = (0, 1, 2)
KINDS = ("steps", "heavy_tail")
TUNED = "steps_tuned"
ETAS = (1.0, 2.0, 4.0)
N_DEVICES = 16
ROUNDS = 8
ADAPTERS = {"rank": 4, "alpha": 8.0}
TRAINING = {"steps": 5, "batch_size": 4, "seq_len": SEQ_LEN, "learning_rate": 8e-3}
MEMORY = "/dev/shm"  # every step of the product is durable: on a disk the clock on the wall would tick for that alone


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a federation runs: updates per version, and whether devices wait for the version."""

    window: int
    waits: bool
    rates: Rates = Rates()


SYNCHRONOUS = Way(window=N_DEVICES, waits=True)
ASYNCHRONOUS = Way(window=4, waits=False)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A champion: virtual seconds at which it came, and its held-out loss in nats per token."""

    at_s: float
    loss: float


def durations(kind: str, seed: int) -> Duration:
    """Return what each device's next local update takes, seconds; the same draws for every caller."""
    rngs = [np.random.default_rng([seed, device]) for device in range(N_DEVICES)]

    def steps(device: int) -> float:
        mean = (100.0, 200.0, 400.0)[(device + seed) % 3]
        return 5.0 + rngs[device].normal(mean, mean / 100)

    def heavy_tail(device: int) -> float:
        return rngs[device].lognormal(np.log(100.0), 1.5)

    return {"steps": steps, "heavy_tail": heavy_tail}[kind]


def run(way: Way, kind: str, seed: int, *, target: float, until_s: float) -> list[Point]:
    """Run a federation until its champion's loss is at most `target` or the virtual time is over.

    Args:
        way: of running.
        kind: of durations.
        seed: of everything else.
        target: nats per token.
        until_s: virtual seconds.

    Returns:
        The champions, the first at 0 s.
    """
    place = MEMORY if os.path.isdir(MEMORY) else None
    with tempfile.TemporaryDirectory(dir=place) as directory:
        federation = SmallFederation(
            Path(directory),
            seed=seed,
            n_devices=N_DEVICES,
            adapters=ADAPTERS,
            training=TRAINING,
            sections={"window": {"min_updates": way.window, "max_wait_s": 0.0}, "rates": way.rates.model_dump()},
        )
        points = [Point(at_s=0.0, loss=federation.loss())]
        clock = play(
            N_DEVICES,
            window=way.window,
            waits=way.waits,
            duration=durations(kind, seed),
            start=federation.start,
            finish=federation.finish,
        )
        for now_s in clock:
            federation.fold()
            points.append(Point(at_s=now_s, loss=federation.loss()))
            if points[-1].loss <= target or now_s >= until_s:
                break
        federation.close()
    return points


def round_ends(kind: str, seed: int, n_rounds: int) -> list[float]:
    """Return when synchronous rounds end, virtual seconds."""

    def nothing(_device: int) -> None:
        pass

    clock = play(N_DEVICES, window=N_DEVICES, waits=True, duration=durations(kind, seed), start=nothing, finish=nothing)
    return list(islice(clock, n_rounds))


@cache
def round_losses(seed: int, eta_t2: float = 1.0) -> list[float]:
    """Return the loss before and after each synchronous round; how long its devices take plays no part in it."""
    until_s = round_ends("steps", seed, ROUNDS)[-1]
    way = replace(SYNCHRONOUS, rates=Rates(eta_t2=eta_t2))
    return [point.loss for point in run(way, "steps", seed, target=0.0, until_s=until_s)]


def rounds_of(kind: str, seed: int, eta_t2: float = 1.0) -> list[Point]:
    """Return the champions of synchronous rounds."""
    times_s = [0.0, *round_ends(kind, seed, ROUNDS)]
    return [Point(at_s=at_s, loss=loss) for at_s, loss in zip(times_s, round_losses(seed, eta_t2), strict=True)]


def both(kind: str, seed: int) -> tuple[list[Point], list[Point]]:
    """Return the champions of synchronous rounds, and of the asynchronous run to the loss of the last of them."""
    rounds = rounds_of(kind, seed)
    return rounds, run(ASYNCHRONOUS, kind, seed, target=rounds[-1].loss, until_s=2 * rounds[-1].at_s)


def tuned(seed: int) -> tuple[list[Point], list[Point]]:
    """Return what `both` does for `steps`, each way with its best η_T2: rounds of least loss, the run first as good."""
    rounds = min((rounds_of("steps", seed, eta) for eta in ETAS), key=lambda points: points[-1].loss)
    target, until_s = rounds[-1].loss, 2 * rounds[-1].at_s
    ways = [replace(ASYNCHRONOUS, rates=Rates(eta_t2=eta)) for eta in ETAS]
    runs = [run(way, "steps", seed, target=target, until_s=until_s) for way in ways]
    return rounds, min(runs, key=lambda points: (points[-1].loss > target, points[-1].at_s))


def speed_up(rounds: list[Point], other: list[Point]) -> float:
    """Return the time of the last round over that of the first champion of `other` that is as good.

    Raises:
        RuntimeError: there is none.
    """
    as_good = [point.at_s for point in other if point.loss <= rounds[-1].loss]
    if not as_good:
        raise RuntimeError(f"no champion reached {rounds[-1].loss:.4f} nats in {other[-1].at_s:.0f} virtual seconds")
    return rounds[-1].at_s / as_good[0]


def main(kinds: Sequence[str], seeds: Sequence[int]) -> None:
    """Print loss over virtual time of both ways, then the speed-ups as a line of JSON: kind → one per seed."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for seed in seeds:
        for kind in kinds:
            rounds, champions = tuned(seed) if kind == TUNED else both(kind, seed)
            found[kind].append(speed_up(rounds, champions))
            print(f"{kind}, seed {seed}: {found[kind][-1]:.2f} times as fast to {rounds[-1].loss:.4f} nats per token")
            for name, points in (("synchronous", rounds), ("asynchronous", champions)):
                print(f"  {name:13s}", "  ".join(f"{p.at_s:.0f} s {p.loss:.3f}" for p in points), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    words = sys.argv[1:]
    main(
        [word for word in words if not word.isdigit()] or KINDS,
        [int(word) for word in words if word.isdigit()] or SEEDS,
    )

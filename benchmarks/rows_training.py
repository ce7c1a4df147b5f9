"""Training in the data centre: several ranks compute what one does, and a killed run ends as a whole one would.

Items 1 and 2 of issue 6, for the plain torch backend over gloo. The ranks are processes on this machine, forked from
one that has imported torch (`tests/tier1/training/rank_process.py`); where they are killed, the model is a Mixtral with
dropout and router noise, so that random numbers count.
"""

from __future__ import annotations

import random
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path

from benchmarks.registry import Reading, figure
from tests.tier1.training.rank_process import Ended, RankRunner

SEED = 20261122
KILLS = 10
RUN = {"steps": 40, "every": 7}
REPEATS = 5
TIMED = {"steps": 8, "batch_size": 32, "large": True}


@figure("training.ranks_equal", unit="1", bound="<= 0.001", cls="full")
def ranks_equal() -> float:
    """Largest relative difference of the loss over 50 steps between one process and 2 ranks, at equal global batch."""
    with _runner() as runner:
        (one,), two = (_done(runner.run(n, steps=50, still=True)) for n in (1, 2))
    if two[0].losses != two[1].losses or two[0].weights != two[1].weights:
        raise RuntimeError("the two ranks differ from each other")
    return max(abs(a - b) / a for a, b in zip(one.losses, two[0].losses, strict=True))


@figure("training.resume_identical", unit="%", bound="== 100", cls="full")
def resume_identical() -> float:
    """Share of 10 runs on 2 ranks, one rank killed at a random step, that go on to the bits of an uninterrupted run."""
    rng, equal = random.Random(SEED), 0
    with _runner() as runner:
        whole = _done(runner.run(2, **RUN))[0].weights
        for _ in range(KILLS):
            rank, step = rng.randrange(2), rng.randrange(1, RUN["steps"])
            with tempfile.TemporaryDirectory() as directory:
                ended = runner.run(2, directory=directory, kill={rank: f"core.after_step:{step}"}, **RUN)
                if ended[rank].status != -signal.SIGKILL or ended[1 - rank].error != "TransportError":
                    raise RuntimeError(f"seed {SEED}, rank {rank} killed at step {step}: {ended}")
                resumed = _done(runner.run(2, directory=directory, **RUN))
            if len(resumed[0].losses) != RUN["steps"] - step // RUN["every"] * RUN["every"]:
                raise RuntimeError(f"seed {SEED}, killed at step {step}: {len(resumed[0].losses)} steps were repeated")
            equal += all(one.weights == whole for one in resumed)
    return 100 * equal / KILLS


@figure("training.killed_rank", unit="s", bound="<= 10", cls="full")
def killed_rank() -> Reading:
    """Time in which the other of 2 ranks ends with one error after a rank was killed by SIGKILL, median of 5."""
    with _runner() as runner:
        repeats = [runner.run(2, kill={1: "core.after_step:3"}, **RUN)[0] for _ in range(REPEATS)]
    if {one.error for one in repeats} != {"TransportError"}:
        raise RuntimeError(str(repeats))
    return Reading.of([one.ended_s - one.steps_s[-1] for one in repeats])


@figure("training.tokens_1_rank", unit="tokens/s", cls="full")
def tokens_one_rank() -> Reading:
    """Tokens per second of one rank, one thread, batches of 32 rows of 96 tokens, the demo's model; median of 5."""
    return _speeds()[1]


@figure("training.tokens_2_ranks", unit="tokens/s", cls="full")
def tokens_two_ranks() -> Reading:
    """Tokens per second of 2 ranks of one thread each on the same batches, once their losses are equal; median of 5."""
    return _speeds()[2]


@cache
def _speeds() -> dict[int, Reading]:
    """Return number of ranks → tokens per second, after comparing the losses; the first steps warm up."""
    with _runner() as runner:
        runs = {n: _done(runner.run(n, **TIMED))[0] for n in (1, 2)}
    for one, two in zip(runs[1].losses, runs[2].losses, strict=True):
        if abs(one - two) > 1e-3 * one:
            raise RuntimeError(f"losses differ: {one} on one rank, {two} on two")
    tokens = TIMED["batch_size"] * 96
    return {
        n: Reading.of([tokens / (end - begin) for begin, end in pairwise(run.steps_s[-REPEATS - 1 :])])
        for n, run in runs.items()
    }


def _done(ended: list[Ended]) -> list[Ended]:
    if any(one.status for one in ended):
        raise RuntimeError(str(ended))
    return ended


@contextmanager
def _runner() -> Iterator[RankRunner]:
    with tempfile.TemporaryDirectory() as scratch, RankRunner(Path(scratch)) as runner:
        yield runner

"""DeepSpeed: the curve of plain torch on every layout, the same bits after a kill, and what it costs.

Items 1 and 2 of issue 6 over gloo, on the CPUs of this machine. AdamW with ε = 1e-8 throughout, clipping at 1. Where
the speed is measured the model is the demo's, which is far too small to gain from being cut: they say what it costs.
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

LAYOUTS: dict[str, dict | None] = {
    "torch": None,
    "zero_1": {"zero_stage": 1},
    "zero_2": {"zero_stage": 2},
    "zero_3": {"zero_stage": 3},
    "experts": {"zero_stage": 2, "expert_parallel": 2},
    "experts_zero_3": {"zero_stage": 3, "expert_parallel": 2},
}
SAID = {
    "torch": "plain torch",
    "zero_1": "ZeRO-1",
    "zero_2": "ZeRO-2",
    "zero_3": "ZeRO-3",
    "experts": "ZeRO-2 and the experts cut in two",
    "experts_zero_3": "ZeRO-3 and the experts cut in two",
}
SEED, REPEATS = 20261123, 5
KILLED = {"steps": 16, "every": 5}
WITHOUT_REHEARSAL = ["ewc", "freeze", "frequencies"]  # all that ZeRO-3 has
EVERY = ["replay", "distillation", *WITHOUT_REHEARSAL]
SAFEGUARDED = {"steps": 24, "still": True}
TIMED = {"steps": REPEATS + 3, "batch_size": 32, "large": True}


@figure("training.engines_equal", unit="1", bound="<= 0.001", cls="full")
def engines_equal() -> float:
    """Largest relative difference of the loss over 50 steps: 1 process of plain torch, 2 ranks on every layout."""
    run = {"steps": 50, "still": True}
    worst = 0.0
    with _runner("deepspeed") as runner:
        (one,) = _done(runner.run(1, **run))
        for layout in LAYOUTS.values():
            first, second = _done(runner.run(2, engine=layout, **run))
            if first.losses != second.losses or first.weights != second.weights:
                raise RuntimeError(f"the two ranks differ from each other with {layout}")
            worst = max(worst, _apart(first, one))
    return worst


@figure("training.engine_resume", unit="%", bound="== 100", cls="long")
def engine_resume() -> float:
    """Share of 10 runs on 2 ranks of ZeRO-1/2/3 and cut experts, one killed at a random step, that end bit-equal."""
    rng, equal = random.Random(SEED), 0
    cut = [layout for layout in LAYOUTS.values() if layout]
    with _runner("deepspeed") as runner:
        for layout in cut:
            run = {"engine": layout, "router_noise": layout == LAYOUTS["zero_1"], **KILLED}
            whole = _done(runner.run(2, **run))[0].weights
            for _ in range(10 // len(cut)):
                equal += _killed_and_resumed(runner, run, rng) == [whole, whole]
    return 100 * equal / (10 // len(cut) * len(cut))


def _killed_and_resumed(runner: RankRunner, run: dict, rng: random.Random) -> list[str]:
    """Kill one of 2 ranks at a random step, go on, and return the weights that each rank ends with."""
    rank, step = rng.randrange(2), rng.randrange(1, KILLED["steps"])
    with tempfile.TemporaryDirectory() as directory:
        ended = runner.run(2, directory=directory, kill={rank: f"core.after_step:{step}"}, **run)
        if ended[rank].status != -signal.SIGKILL or ended[1 - rank].error != "TransportError":
            raise RuntimeError(f"{run['engine']}, rank {rank} killed at step {step}: {ended}")
        resumed = _done(runner.run(2, directory=directory, **run))
    if len(resumed[0].losses) != KILLED["steps"] - step // KILLED["every"] * KILLED["every"]:
        raise RuntimeError(f"{run['engine']}, killed at step {step}: {len(resumed[0].losses)} steps were repeated")
    return [one.weights for one in resumed]


@figure("training.safeguards_equal", unit="1", bound="<= 0.001", cls="full")
def safeguards_equal() -> float:
    """Largest relative difference of the loss over 24 steps with safeguards: 1 process, 2 ranks of each layout."""
    worst = 0.0
    with _runner("deepspeed") as runner:
        (plain,) = _done(runner.run(1, **SAFEGUARDED))
        for safeguards in (EVERY, WITHOUT_REHEARSAL):
            (one,) = _done(runner.run(1, safeguards=safeguards, **SAFEGUARDED))
            if _apart(one, plain) < 0.1:
                raise RuntimeError(f"{safeguards} do nothing: {one.losses}, without {plain.losses}")
            for layout in (layout for layout in LAYOUTS.values() if _safeguards_of(layout) == safeguards):
                first, second = _done(runner.run(2, engine=layout, safeguards=safeguards, **SAFEGUARDED))
                if first.losses != second.losses or first.weights != second.weights:
                    raise RuntimeError(f"the two ranks differ from each other with {layout}")
                worst = max(worst, _apart(first, one))
    return worst


@figure("training.safeguards_resume", unit="%", bound="== 100", cls="long")
def safeguards_resume() -> float:
    """Share of 6 runs on 2 ranks of every layout, with safeguards and one rank killed, that end bit-equal."""
    rng, equal = random.Random(SEED), 0
    with _runner("deepspeed") as runner:
        for layout in LAYOUTS.values():
            run = {"engine": layout, "router_noise": False, "safeguards": _safeguards_of(layout), **KILLED}
            whole = _done(runner.run(2, **run))[0].weights
            equal += _killed_and_resumed(runner, run, rng) == [whole, whole]
    return 100 * equal / len(LAYOUTS)


def _safeguards_of(layout: dict | None) -> list[str]:
    return WITHOUT_REHEARSAL if layout and layout["zero_stage"] == 3 else EVERY


@figure("training.deepspeed_start", unit="s", cls="full")
def deepspeed_start() -> Reading:
    """Time that DeepSpeed adds until the first step of one process is done: import and engine; median of 5."""
    with _runner() as runner:  # one that has not imported it

        def first_step(engine: dict | None) -> float:
            (one,) = _done(runner.run(1, steps=1, engine=engine))
            return one.steps_s[0] - one.began_s

        return Reading.of([first_step({"zero_stage": 2}) - first_step(None) for _ in range(REPEATS)])


def _rows_of(layout: str) -> None:
    """Register speed and memory of one layout."""

    def tokens() -> Reading:
        seconds = [end - begin for begin, end in pairwise(_timed()[layout].steps_s[-REPEATS - 1 :])]
        return Reading.of([TIMED["batch_size"] * 96 / one for one in seconds])

    def memory() -> float:
        return _timed()[layout].peak_mib

    tokens.__doc__ = f"Tokens per second of 2 ranks, {SAID[layout]}, the demo's model; median of 5."
    memory.__doc__ = f"Peak memory of one of 2 ranks, {SAID[layout]}, the demo's model, torch itself included."
    figure(f"training.tokens_{layout}", unit="tokens/s", cls="full")(tokens)
    figure(f"training.memory_{layout}", unit="MiB", cls="full")(memory)


for _layout in LAYOUTS:
    _rows_of(_layout)


@cache
def _timed() -> dict[str, Ended]:
    """Run every layout on the same batches and compare the losses; the first steps warm up."""
    with _runner() as plain, _runner("deepspeed") as runner:  # which takes memory also where it is not used
        runs = {
            name: _done((runner if layout else plain).run(2, engine=layout, **TIMED))[0]
            for name, layout in LAYOUTS.items()
        }
    for name, run in runs.items():
        if _apart(run, runs["torch"]) > 1e-3:
            raise RuntimeError(f"losses of {name} differ from plain torch's: {run.losses}, {runs['torch'].losses}")
    return runs


def _apart(run: Ended, reference: Ended) -> float:
    return max(abs(a - b) / b for a, b in zip(run.losses, reference.losses, strict=True))


def _done(ended: list[Ended]) -> list[Ended]:
    if any(one.status for one in ended):
        raise RuntimeError(str(ended))
    return ended


@contextmanager
def _runner(*imported: str) -> Iterator[RankRunner]:
    with tempfile.TemporaryDirectory() as scratch, RankRunner(Path(scratch), *imported) as runner:
        yield runner

"""Flyte's own share of a round: wall time of the workflow less the time inside the bodies of its tasks.

One nested round in this process with the demo's model, a fifteenth of its core update and four devices' updates: the
demo's structure, in less of the time that its share is measured against. What is Flyte's: building and checking nodes,
types and literals, files, decks, and asking the question.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

from benchmarks.registry import Reading, figure

REPEATS = 5
CLIENTS = ("ann", "bob", "cyd", "dan")
MODEL = {"family": "mixtral", "vocab_size": 300, "config": {}}  # the words of the test data make no larger one


@figure("flyte.overhead", unit="%", bound="<= 5", cls="full")
def flyte_overhead() -> Reading:
    """Flyte's own share of a nested round with the demo's model, a fifteenth of its core update and four devices."""
    from flytekit.types.file import FlyteFile

    from services.gates import answer_gates
    from tests.federation import Device, make_workspace
    from tier1.federation import open_federation
    from workflows.nested_round import nested_round

    shares = []
    with tempfile.TemporaryDirectory() as scratch, _timed_bodies() as inside:
        core = {"steps": 20, "batch_size": 16, "seq_len": 96, "learning_rate": 3e-3, "threads": 2}
        path = make_workspace(Path(scratch), clients=CLIENTS, model=MODEL, core=core)
        config, fed = FlyteFile(str(path)), open_federation(path)
        for number in range(REPEATS + 1):
            inside.clear()
            began = time.perf_counter()
            with answer_gates(lambda: "approve"):
                outcome, _ = nested_round(config=config, core=True)
            wall_s = time.perf_counter() - began
            if outcome.verdict != "approved":
                raise RuntimeError(f"round {number} ended as {outcome.verdict}: {outcome.reason}")
            if number:  # the first has no devices' updates, for there was no champion to train on, and imports
                shares.append(100 * (wall_s - sum(inside.values())) / wall_s)
                _print(number, wall_s, inside)
            for client in CLIENTS:
                Device(fed, client, sequence=number).send()
    return Reading.of(shares)


@contextmanager
def _timed_bodies() -> Iterator[Counter[str]]:
    """Count the seconds inside the body of every task, by its name; a router's body is Flyte's."""
    from flytekit.core.context_manager import FlyteEntities
    from flytekit.core.python_function_task import PythonFunctionTask

    import workflows.nested_round  # noqa: F401  its tasks are entities from now on

    inside: Counter[str] = Counter()
    shells = [each for each in FlyteEntities.entities if isinstance(each, PythonFunctionTask)]
    shells = [each for each in shells if each.execution_mode is each.ExecutionBehavior.DEFAULT]
    bodies = [shell._task_function for shell in shells]
    for shell, body in zip(shells, bodies, strict=True):
        shell._task_function = _timed(body, shell.name, inside)
    try:
        yield inside
    finally:
        for shell, body in zip(shells, bodies, strict=True):
            shell._task_function = body


def _timed(body: Callable, name: str, inside: Counter[str]) -> Callable:
    @wraps(body)
    def timed(*args: object, **kwargs: object) -> object:
        began = time.perf_counter()
        try:
            return body(*args, **kwargs)
        finally:
            inside[name] += time.perf_counter() - began

    return timed


def _print(number: int, wall_s: float, inside: Counter[str]) -> None:
    flyte_s = wall_s - sum(inside.values())
    print(f"round {number}: {wall_s:.2f} s, Flyte's own {flyte_s:.3f} s", file=sys.stderr)
    for name, seconds in inside.most_common():
        print(f"  {seconds:8.3f} s  {100 * seconds / wall_s:5.1f} %  {name}", file=sys.stderr)

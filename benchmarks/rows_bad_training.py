"""What bad input to the trainer gets: one error that says what to do, and the last good checkpoint as it was.

Item 7 of issue 6. Every case trains a small Mixtral to its checkpoint of step 4, goes on with something wrong, and then
once more with it put right: only who ends with the bits of an undisturbed run has kept the last good state.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.registry import figure
from tests.tier1.training.rank_process import MODEL, Ended, RankRunner

# What is wrong → arguments of the run, and what its error says.
CASES: dict[str, tuple[dict, str]] = {
    "checkpoint of another run": ({"steps": 20}, r"TrainingError.* is of another run: .* train under another run name"),
    "loss that is not finite": ({"poisoned_rank": 1}, r"TrainingError.*step 6 of 12 .* \(rows .*lower core\.learning"),
    "killed rank": ({"kill": {1: "core.after_step:2"}}, r"TransportError.*lost another rank .* run again"),
    "full disk": ({"file_limit": 100_000}, r"StorageError.*free space .* the checkpoint of step 4 is intact"),
    "ranks that do not divide the experts": (
        {"engine": {"expert_parallel": 3}, "router_noise": False},
        rf"ConfigError.*divide the 2 rank\(s\) and the {MODEL['num_local_experts']} experts, got 3: set it to 1 or 2",
    ),
    "too little memory": ({"starved_rank": 0}, r"TrainingError.*4 rows per pass: set core\.micro_batch to 2"),
    "no rows": ({"n_rows": 0}, r"DataError.*at least 1, got 0: add text"),
    "another tokenizer": ({"token": 300}, r"DataError.*vocabulary of 300, got 300.*packed with another tokenizer"),
    "half-written checkpoint": ({"kill": {0: "checkpoint.before_rename:1"}}, r"TransportError.*newest checkpoint"),
}


@figure("training.bad_input", unit="%", bound="== 100", cls="full")
def bad_input() -> float:
    """Share of 9 kinds of bad input that end in one error with its remedy and leave the last good checkpoint usable."""
    with tempfile.TemporaryDirectory() as scratch, RankRunner(Path(scratch)) as runner:
        (whole, _) = runner.run(2)
        good = [_ends_well(runner.run, *case, whole) for case in CASES.values()]
    return 100 * sum(good) / len(good)


def _ends_well(run: Callable[..., list[Ended]], wrong: dict, says: str, whole: Ended) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        run(2, directory=directory, kill={0: "core.after_step:5"})
        ended = run(2, **({"directory": directory} | wrong))
        again = run(2, directory=directory)
    said = [f"{one.error}: {one.message}" for one in ended if one.error]
    alike = any(re.search(says, line) and "\n" not in line for line in said)
    return alike and [one.weights for one in again] == [whole.weights] * 2 and len(again[0].losses) == 8

"""Domains of devices that arrive one after the other: what their folds forget, with protected directions and without.

    python -m benchmarks.orthogonal [SEED ...]

Version 1 is tier 1's first training, on plays. Then four domains of other text, each for `ROUNDS` rounds: its devices
train on the champion, send, and leave; every round is a fold through the real loop. Gain, forgetting and what is kept
of the newest domain's gain are those of `forgetting.py`, on held-out lines of the devices. The gate lets everything
pass and the probe is off, because both look at all domains and would refuse the forgetting that is to be seen.

`smaller steps` is what a protection has to be better than: folds with a smaller η_T2 forget less, too. Its η and the
protection's settings were chosen on seed `TUNED_ON`.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from benchmarks.forgetting import BASE, Remembered, domain_texts, remembered
from benchmarks.world import Run, Sizes, World, approve
from examples.shakespeare import corpus as plays
from tier1.federation import Federation
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.versions.settings import Rates
from tier1.workspace import AGGREGATION

TUNED_ON, SEEDS = 7, (0, 1, 2)
DOMAINS = ("readmes", "python", "yaml", "api")
ROUNDS = 3
ROW_CHARS = 400
SIZES = Sizes(n_devices=2, core_steps=300, local_steps=10, suite_tokens=64, judge_tokens=2048)  # devices of a domain


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A protection and a step."""

    orthogonal: Mapping[str, Any] | None = None
    eta: float = 1.0


VARIANTS = {
    "none": Variant(),
    "orthogonal": Variant(orthogonal={"versions": 12, "rank": 16}),
    "smaller steps": Variant(eta=0.55),
}


class Domains(World):
    """A world whose devices come in domains, and whose judge looks at tier 1's text too."""

    def __init__(self, directory: Path, seed: int, sizes: Sizes = SIZES):
        super().__init__(directory, seed, sizes)
        self.judges[BASE] = self.corpus.suites["tier1"]

    def _prepared(self) -> plays.Corpus:
        source, n = self.directory / "source", self.sizes.n_devices
        source.mkdir()
        for name, texts in domain_texts().items():
            rows = [text[i : i + ROW_CHARS] for text in texts for i in range(0, len(text), ROW_CHARS)]
            if name == BASE:
                _write(source / plays.TIER1_FILE, rows)
            elif name in DOMAINS:
                for device in range(n):
                    _write(source / f"{name}-{device}.jsonl", rows[device::n])
        return plays.prepare_from_files(source, self.directory / "text", self.seed, seq_len=self.sizes.seq_len)


@dataclass
class Arrivals(Run):
    """A history of domains in sequence."""

    eta: float = 1.0

    @cached_property
    def fed(self) -> Federation:
        """The federation of this run, with its step and a gate that lets everything pass."""
        config = Run.fed.func(self).config
        evaluation = config.evaluation.model_copy(update={"max_regression": 100.0})
        return Federation(config=config.model_copy(update={"evaluation": evaluation, "rates": Rates(eta_t2=self.eta)}))

    def judged(self) -> list[float]:
        """Return the champion's held-out loss on the base's text, and of every domain the mean over its devices."""
        found = self.world.judge(self.fed, self.champion)
        return [
            float(np.mean([loss for client, loss in found.items() if client.startswith(name)]))
            for name in (BASE, *DOMAINS)
        ]

    def arrive(self, domain: str, rounds: int) -> None:
        """Let the devices of a domain take part for some rounds."""
        for sequence in range(rounds):
            for client in (client for client in self.world.clients if client.startswith(domain)):
                self.append(client, *self.sealed(client, sequence, self.honest(client, sequence)))
            settled = approve(self.fed, fold_updates(self.fed, take_updates(self.fed)))
            if settled.status != "head":
                raise RuntimeError(f"a fold is {settled.status}: {settled.reason}")


def _write(path: Path, rows: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


def losses_of(world: Domains, name: str, variant: Variant, rounds: int = ROUNDS) -> np.ndarray:
    """Return the held-out losses [1 + domains, 1 + domains] of a sequence; row 0 and column 0 are the base's."""
    aggregation = {**AGGREGATION, "probe": None, "orthogonal": variant.orthogonal}
    run = Arrivals(world, name.replace(" ", "-"), aggregation=aggregation, eta=variant.eta)
    losses = [run.judged()]
    for domain in DOMAINS:
        run.arrive(domain, rounds)
        losses.append(run.judged())
    return np.array(losses)


def compare(seed: int, variants: Mapping[str, Variant] = VARIANTS) -> dict[str, Remembered]:
    """Run the same arrivals with every variant."""
    with tempfile.TemporaryDirectory() as directory:
        world = Domains(Path(directory), seed)
        return {name: remembered(losses_of(world, name, variant)) for name, variant in variants.items()}


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    found = [compare(int(seed)) for seed in sys.argv[1:] or SEEDS]
    print(json.dumps([{name: asdict(row) for name, row in rows.items()} for rows in found]))

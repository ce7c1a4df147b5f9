"""Two tier-1 clusters that meet every 50 steps, against one cluster with twice the batch: item 4 of issue 6.

    python -m benchmarks.co_training [SEED ...]

Everything is the product: packing, trainer, signed deltas on `updates.tier1`, blob store, fold, gate, manifest chain. A
seed chooses held-out text, first weights and order of rows; both ways begin from one genesis and train on the same
text, once as many tokens.

    one    ROUNDS·H steps of 2·B rows, one core update with one schedule
    two    ROUNDS rounds of H steps of B rows on each of two clusters; a cluster has every second line of the text

    gain kept  =  (loss of genesis − loss of two) / (loss of genesis − loss of one)         on lines the gate never sees

`one` has the learning rate that is best for it, `two` learning rate, β, its warm-up and η (see `docs/training.md`),
chosen on seeds 100 and 101; the claim is measured on others.

Traffic counts bytes: what both clusters publish in a round (records and slices) and fetch of the version that is made
of it, over what two ranks send and receive when they all-reduce the gradients of H steps around a ring, 2·(n − 1)/n of
their bytes each way; those are counted where the trainer hands them to its ranks.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog
import yaml

from benchmarks.world import MODEL, seed_of
from examples.shakespeare import corpus as plays
from fednested_lib.log import DENSE
from fednested_lib.signing import Signer
from fednested_lib.snapshot import build_model
from tier1.evaluation.suites import evaluate
from tier1.federation import Federation, open_federation
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import settle_candidate
from tier1.loops.genesis import ensure_genesis
from tier1.loops.records import DenseRef
from tier1.loops.replay import replay_versions
from tier1.training.ranks import ALONE, Ranks
from tier1.workspace import create_workspace

SEEDS = (0, 1, 2)
SEQ_LEN = 48
JUDGE_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and with what both ways train.

    Args:
        rounds: how often the clusters meet.
        steps: H, AdamW steps of a cluster between two meetings.
        batch: B, rows of a step on one cluster.
        one_rate: peak learning rate of the one cluster.
        rate: peak learning rate of the two.
        beta: of Nesterov.
        warmup: rounds over which β rises from 0.
        eta: η_core and η_T1.
        keeps: whether a cluster keeps optimiser and schedule between rounds.
        before: steps of 2·B rows that version 1 has behind it when both ways begin; 0 begins with genesis.
    """

    rounds: int = 12
    steps: int = 50
    batch: int = 8
    one_rate: float = 4.5e-3
    rate: float = 3.5e-3
    beta: float = 0.6
    warmup: int = 1
    eta: float = 0.85
    keeps: bool = True
    before: int = 0


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What one seed gives: losses in nats per token, kept and traffic in percent, verdicts of the replay."""

    seed: int
    begin: float
    one: float
    two: float
    traffic: float
    replayed: dict[str, int]

    @property
    def kept(self) -> float:
        """Share of the one cluster's gain that the two have, percent."""
        return 100 * (self.begin - self.two) / (self.begin - self.one)


@dataclass(frozen=True, kw_only=True)
class Counting(Ranks):
    """A single rank that counts the bytes it would all-reduce."""

    sizes: list[int] = field(default_factory=list)

    def mean_(self, tensors) -> None:
        """Count; the mean over one rank is what it has."""
        self.sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def compare(seed: int, plan: Plan = Plan(), model: Mapping[str, Any] = MODEL) -> Compared:
    """Train both ways from one genesis and judge them on the same text.

    Raises:
        RuntimeError: a version did not pass its gate at once, or replay is not identical.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory(dir=memory()) as directory:
        scene = _Scene(Path(directory), seed, plan, model)
        one, sizes = scene.one()
        clusters, published = scene.two()
        begin = scene.judge(scene.base)
        per_step = 2 * sum(sizes) / (plan.rounds * plan.steps)  # each of two ranks sends and receives all of it
        verdicts = [line.split(": ")[1].split(",")[0] for line in replay_versions(clusters[0]) if line[:7] == "version"]
        if set(verdicts) != {"identical"}:
            raise RuntimeError(f"seed {seed}: replay says {verdicts}")
        return Compared(
            seed=seed,
            begin=begin,
            one=scene.judge(one),
            two=scene.judge(clusters[0]),
            traffic=100 * published / (2 * per_step * plan.rounds * plan.steps),
            replayed={"identical": len(verdicts)},
        )


class _Scene:
    """Text, a base version, and the two ways on from it."""

    def __init__(self, directory: Path, seed: int, plan: Plan, model: Mapping[str, Any]):
        self.directory, self.seed, self.plan = directory, seed, plan
        corpus = plays.prepare(directory / "text", seed, n_devices=2)
        self.text = corpus.tier1
        suite, self.held_out = dealt(corpus.suites[f"genre-{plays.TIER1_GENRE}"])
        self.halves = dealt(corpus.tier1)
        path = create_workspace(
            directory / "base",
            datasets={"text": str(self.text)},
            suites={"tier1": str(suite)},
            overrides={
                "log": {"bootstrap": f"memory:co-training-{directory.name}"},
                "model": {"seed": seed, "vocab_size": 512, "config": dict(model)},
                "core": self._core(steps=max(plan.before, 1), batch_size=2 * plan.batch),
                "evaluation": {"max_tokens": 2048, "seq_len": SEQ_LEN},
            },
        )
        self.base = open_federation(path)
        ensure_genesis(self.base)
        if plan.before:
            _advance(self.base, _trained(self.base, "before"))

    def _core(self, **changes: Any) -> dict[str, Any]:
        common = {"seq_len": SEQ_LEN, "threads": 1, "seed": self.seed, "learning_rate": self.plan.one_rate}
        return {**common, "checkpoint_every": None, **changes}

    def one(self) -> tuple[Federation, list[int]]:
        """Train one cluster; return it and the bytes of gradients of each step."""
        plan, counting = self.plan, Counting()
        fed = self._open("one", "one", core=self._core(steps=plan.rounds * plan.steps, batch_size=2 * plan.batch))
        _advance(fed, _trained(fed, "one", counting))
        return fed, counting.sizes

    def two(self) -> tuple[list[Federation], int]:
        """Train two clusters; return them and the bytes that both published and fetched."""
        plan, clusters, n_bytes = self.plan, [], 0
        for number, half in enumerate(self.halves):
            core = self._core(
                datasets={"text": str(half)},
                steps=plan.steps,
                batch_size=plan.batch,
                learning_rate=plan.rate,
                seed=seed_of(self.seed, "cluster", number),
                schedule_steps=plan.rounds * plan.steps if plan.keeps else None,
                delta_dtype="float16",
                clusters={"count": 2},
            )
            outer = {"core_outer": {"kind": "nesterov", "beta": plan.beta, "warmup": plan.warmup}}
            rates = {"eta_core": plan.eta, "eta_t1": plan.eta}
            clusters.append(self._open("two", f"cluster-{number}", core=core, aggregation=outer, rates=rates))
        for number in range(plan.rounds):
            before = clusters[0].chain.state().head
            low = clusters[0].log.watermarks(DENSE)
            refs = [_trained(fed, f"cluster-{i}-round-{number}") for i, fed in enumerate(clusters)]
            for fed, ref in zip(clusters, refs, strict=True):
                _advance(fed, ref)
            after = clusters[0].chain.state().head
            if after.version != before.version + 1:
                raise RuntimeError(f"round {number} made {after.version - before.version} versions")
            changed = set(after.blobs.values()) - set(before.blobs.values())
            fetched = sum(len(clusters[0].blobs.get(digest)) for digest in changed)
            n_bytes += _published(clusters[0], low) + len(clusters) * fetched
        return clusters, n_bytes

    def _open(self, way: str, name: str, **sections: Mapping[str, Any]) -> Federation:
        """Open a configuration of its own, with a key of its own, over the way's copy of the base."""
        directory = self.directory / way
        if not directory.exists():
            shutil.copytree(self.directory / "base", directory)
        keys = {f"cluster-{number}": Signer.from_seed(bytes([number + 1] * 32)) for number in range(2)}
        keys["one"] = Signer.load(directory / "keys/tier1.key")
        keys[name].save(directory / f"keys/{name}.key")
        document = yaml.safe_load((directory / "tier1.yaml").read_text())
        document["log"]["bootstrap"] += f"-{way}"
        document["identity"] |= {
            "key": f"keys/{name}.key",
            "trusted": {key.public_key: label for label, key in keys.items()},
        }
        for section, values in sections.items():
            document[section] = {**document.get(section, {}), **values}
        path = directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document))
        return open_federation(path)

    def judge(self, fed: Federation) -> float:
        """Return the loss of head on lines that no gate has seen, nats per token."""
        view = fed.chain.state().head
        found = evaluate(
            build_model(view.snapshot, fed.blobs),
            {"held-out": self.held_out},
            fed.blobs.get(view.tokenizer),
            seq_len=SEQ_LEN,
            max_tokens=JUDGE_TOKENS,
        )
        return found["held-out"].nats_per_token


def dealt(path: Path) -> list[Path]:
    """Deal the lines of a file out to two."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    hands = [path.with_name(f"{path.stem}-{hand}.jsonl") for hand in range(2)]
    for hand, target in enumerate(hands):
        target.write_text("".join(lines[hand::2]), encoding="utf-8")
    return hands


def _trained(fed: Federation, run: str, ranks: Ranks = ALONE) -> DenseRef:
    return train_delta(fed, pack_datasets(fed, authorise_training(fed, run)), run, ranks=ranks)


def _advance(fed: Federation, ref: DenseRef) -> None:
    settled = settle_candidate(fed, fold_dense(fed, ref))
    tries = fed.chain.entries()[-1].entry.body.tries
    if settled.status != "head" or len(tries) != 1:
        raise RuntimeError(f"run {ref.run_id}: {settled.status} after {len(tries)} tries, must pass at once")


def _published(fed: Federation, low: Mapping[int, tuple[int, int]]) -> int:
    """Return the bytes of the records since `low` and of the slices that they name."""
    ends = {partition: (low[partition][1], high) for partition, (_, high) in fed.log.watermarks(DENSE).items()}
    records = list(fed.log.read(DENSE, ends))
    slices = {digest for record in records for digest in json.loads(record.value)["blobs"].values()}
    sizes = [len(record.key) + len(record.value) for record in records]
    return sum(sizes) + sum(len(fed.archive.get(digest)) for digest in slices)


def memory() -> str | None:
    """Return a directory in memory, where there is one: every step is durable, and no disk is measured here."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def main(seeds: Sequence[int]) -> None:
    """Print a line per seed, then everything as JSON."""
    rows = []
    for seed in seeds:
        row = compare(seed)
        rows.append({**asdict(row), "kept": row.kept})
        print(
            f"seed {seed}: loss {row.begin:.4f} → one {row.one:.4f}, two {row.two:.4f}; kept {row.kept:.2f} %, "
            f"traffic {row.traffic:.3f} %",
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or SEEDS)

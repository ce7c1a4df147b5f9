"""A federation in one process for benchmarks: real text, real local training, real wire, chain and gate, a tiny MoE.

A `World` is what runs share: speakers of Shakespeare's plays as devices, and version 1, which tier 1 trained on another
genre. A `Run` is one history after it, with a log and a chain of its own. Honest updates of equal base, device and
sequence are trained once: local training is a function of these.
"""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from examples.shakespeare import corpus as plays
from fednested_lib.adapters import RoutedAdapters, attach
from fednested_lib.config import OutgoingConfig
from fednested_lib.delta import AdapterSpec, Delta
from fednested_lib.envelope import HEADER, AdapterFields
from fednested_lib.partition import expert_param
from fednested_lib.sidecar import Outgoing, make_update
from fednested_lib.signing import Signer, canonical_json, sha256_hex
from fednested_lib.snapshot import SnapshotManifest, build_model, expert_shapes
from fednested_lib.spool import Declaration
from fednested_lib.text import load_tokenizer, pack, read_texts
from fednested_lib.training import train_adapters
from tests.policies import make_policy
from tier1.evaluation.suites import evaluate
from tier1.federation import Federation, open_federation
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import decide, settle_candidate
from tier1.loops.records import CandidateRef, Settled
from tier1.versions.state import VersionView
from tier1.workspace import create_workspace

TOPIC = "updates.experts.local"
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
Experts = tuple[int, ...] | Mapping[int, tuple[int, ...]] | None
_logs = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a world is made of; steps are AdamW steps of `batch` × `seq_len` tokens."""

    n_devices: int = 10
    core_steps: int = 300
    local_steps: int = 10
    batch: int = 8
    seq_len: int = 48
    local_rate: float = 8e-3
    rank: int = 4
    suite_tokens: int = 1024  # per device, of gate and probe
    judge_tokens: int = 2048  # per device, of the losses that are compared


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one local training gives: the delta, and counts per layer and adapted expert."""

    delta: Delta
    routed: Mapping[int, list[int]]
    distinct: Mapping[int, list[int]]
    n_rows: int


def key_of(client: str) -> Signer:
    """Return the key of a device, always the same."""
    return Signer.from_seed(bytes.fromhex(sha256_hex(f"benchmark device {client}".encode())))


def seed_of(*parts: object) -> int:
    """Return a 48-bit seed that depends on every part."""
    return int(sha256_hex("/".join(map(str, parts)).encode())[:12], 16)


class World:
    """Text, devices and a first version.

    Args:
        directory: empty; holds everything.
        seed: of the held-out split, of the first weights and of local training.
        sizes: how large.
    """

    def __init__(self, directory: Path, seed: int, sizes: Sizes = Sizes()):
        self.directory, self.seed, self.sizes = directory, seed, sizes
        self.corpus = self._prepared()
        self.clients = sorted(self.corpus.devices)
        # Held-out lines of a device are dealt out: tier 1's gate and probe never see what a run is judged by.
        self.suites, self.judges = (
            {client: self._dealt(client, hand, name) for client in self.clients}
            for hand, name in enumerate(("suite", "judge"))
        )
        self._trained: dict[tuple, Trained] = {}
        self._judged: dict[str, dict[str, float]] = {}
        self._attached: tuple[Any, Any, RoutedAdapters] | None = None
        self._rows: dict[str, np.ndarray] = {}
        self._bootstrap()

    def _prepared(self) -> plays.Corpus:
        return plays.prepare(self.directory / "text", self.seed, n_devices=self.sizes.n_devices)

    def _dealt(self, client: str, hand: int, name: str) -> Path:
        lines = self.corpus.suites[f"device-{client}"].read_text(encoding="utf-8").splitlines(keepends=True)
        path = self.directory / "text" / name / f"{client}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines[hand::2]), encoding="utf-8")
        return path

    def judge(self, fed: Federation, view: VersionView) -> dict[str, float]:
        """Return the held-out loss of a version per device, nats per token; the same weights are judged once."""
        key = sha256_hex(canonical_json(view.snapshot.blobs))
        if key not in self._judged:
            tokenizer, limits = fed.blobs.get(view.snapshot.tokenizer), fed.config.evaluation
            model = build_model(view.snapshot, fed.blobs)
            found = evaluate(model, self.judges, tokenizer, seq_len=limits.seq_len, max_tokens=self.sizes.judge_tokens)
            self._judged[key] = {client: result.nats_per_token for client, result in found.items()}
        return self._judged[key]

    def _bootstrap(self) -> None:
        sizes = self.sizes
        core = {"steps": sizes.core_steps, "batch_size": 16, "learning_rate": 3e-3, "threads": 1}
        self.config = create_workspace(
            self.directory / "base",
            datasets={"tier1": str(self.corpus.tier1)},
            suites={f"device-{client}": str(path) for client, path in self.suites.items()},
            devices={client: key_of(client).public_key for client in self.clients},
            overrides={
                "log": {"bootstrap": f"memory:world-{next(_logs)}"},
                "model": {"seed": self.seed, "vocab_size": 512, "config": MODEL},
                "core": {**core, "seq_len": sizes.seq_len, "seed": self.seed},
                "window": {"min_updates": 1, "max_wait_s": 0.0, "max_updates": 256},
                "evaluation": {"max_tokens": sizes.suite_tokens, "seq_len": sizes.seq_len},
            },
        )
        fed = open_federation(self.config)
        packed = pack_datasets(fed, authorise_training(fed, "bootstrap"))
        approve(fed, fold_dense(fed, train_delta(fed, packed, "bootstrap")))

    def train(
        self,
        fed: Federation,
        base: VersionView,
        client: str,
        sequence: int,
        *,
        experts: Experts = None,
        rows: np.ndarray | None = None,
    ) -> Trained:
        """Train one update as a device does: fresh adapters, its own rows (or `rows`), seed from who and which.

        Args:
            fed: holds the base's blobs.
            base: the version to start from.
            client: whose text.
            sequence: number of the update.
            experts: ids adapted in every layer, or per layer; None: all.
            rows: other text, int32 [n, seq_len + 1]; not kept for another call.
        """
        key = (sha256_hex(canonical_json(base.snapshot.blobs)), client, sequence, str(experts))
        if rows is None and key in self._trained:
            return self._trained[key]
        model, adapters = self._adapted(fed, base.snapshot, experts)
        seed, sizes = seed_of(self.seed, client, sequence), self.sizes
        adapters.reset(seed)
        text = self.rows_of(fed, base.snapshot, client) if rows is None else rows
        train_adapters(
            model,
            adapters,
            text,
            steps=sizes.local_steps,
            batch_size=sizes.batch,
            learning_rate=sizes.local_rate,
            seed=seed,
        )
        # A copy: the adapter may hand out its own memory, which the next device trains in.
        trained = Trained(
            delta=copy.deepcopy(adapters.to_delta()),
            routed=adapters.tokens,
            distinct=adapters.distinct_tokens,
            n_rows=len(text),
        )
        if rows is None:
            self._trained[key] = trained
        return trained

    def rows_of(self, fed: Federation, snapshot: SnapshotManifest, client: str) -> np.ndarray:
        """Return the packed text of a device."""
        if client not in self._rows:
            path = self.corpus.devices[client]
            tokenizer = load_tokenizer(fed.blobs.get(snapshot.tokenizer))
            texts = read_texts(path)[0]
            self._rows[client] = pack(texts, tokenizer, self.sizes.seq_len, source=path, key="sizes.seq_len")
        return self._rows[client]

    def _adapted(self, fed: Federation, snapshot: SnapshotManifest, experts: Experts) -> tuple[Any, RoutedAdapters]:
        """Return the model of a snapshot with adapters; the last one is kept."""
        key = (snapshot.blobs, experts)
        if self._attached is None or self._attached[0] != key:
            same = self._attached is not None and self._attached[0][0] == snapshot.blobs
            model = self._attached[1] if same else build_model(snapshot, fed.blobs, experts="fednested_lora")
            layers = sorted({expert_param(name)[0] for name in expert_shapes(snapshot)})
            spec = AdapterSpec(rank=self.sizes.rank, alpha=2.0 * self.sizes.rank)
            chosen = dict.fromkeys(layers, experts) if isinstance(experts, tuple) else experts
            self._attached = (key, model, attach(model, spec, chosen, seed=0))
        return self._attached[1:]


@dataclass
class Run:
    """One history of a world from version 1 on.

    Args:
        world: where it begins.
        name: of its directory.
        aggregation: settings instead of those that a new workspace has.
    """

    world: World
    name: str
    aggregation: Mapping[str, Any] | None = None
    losses: list[dict[str, float]] = field(default_factory=list)  # per device: of version 1, then after every round
    settled: list[Settled] = field(default_factory=list)

    @cached_property
    def fed(self) -> Federation:
        """The federation of this run: the base's directory copied, a log of its own."""
        directory = self.world.directory / self.name
        shutil.copytree(self.world.config.parent, directory)
        path = directory / "tier1.yaml"
        document = yaml.safe_load(path.read_text())
        document["log"]["bootstrap"] = f"memory:run-{next(_logs)}"
        if self.aggregation is not None:
            document["aggregation"] = dict(self.aggregation)
        path.write_text(yaml.safe_dump(document))
        return open_federation(path)

    @property
    def champion(self) -> VersionView:
        """The version that devices train on."""
        return self.fed.chain.state().champion

    def honest(self, client: str, sequence: int, experts: Experts = None) -> Trained:
        """Train one honest update on the champion."""
        return self.world.train(self.fed, self.champion, client, sequence, experts=experts)

    def sealed(self, client: str, sequence: int, trained: Trained) -> tuple[bytes, bytes]:
        """Return (envelope, payload) as a device's sidecar makes them."""
        made = self.made(client, sequence, trained, OutgoingConfig())
        return made.envelope.to_bytes(), made.payload

    def made(
        self, client: str, sequence: int, trained: Trained, outgoing: OutgoingConfig, carried: Delta | None = None
    ) -> Outgoing:
        """Return what a device's sidecar makes of an update."""
        spec, base = trained.delta.spec, self.champion
        declaration = Declaration(
            sequence=sequence,
            base_version=base.version,
            base_digest=base.base_digest,
            adapter=AdapterFields(rank=spec.rank, alpha=spec.alpha),
            expert_ids={str(expert_param(name)[0]): list(f.expert_ids) for name, f in trained.delta.factors.items()},
            routed_tokens={str(layer): counts for layer, counts in trained.routed.items()},
            distinct_tokens={str(layer): counts for layer, counts in trained.distinct.items()},
            num_examples=trained.n_rows,
            factors_sha256="0" * 64,
        )
        return make_update(
            declaration,
            trained.delta,
            policy=make_policy(),
            encoding=outgoing.encoding,
            levels=outgoing.levels,
            mean_rank=outgoing.mean_rank,
            error_feedback=outgoing.error_feedback,
            carried=carried,
            federation=self.fed.config.federation,
            client_id=client,
            key_epoch=0,
            signer=key_of(client),
        )

    def append(self, client: str, envelope: bytes, payload: bytes) -> None:
        """Put one record on the log; a large payload goes to the drop box, as its envelope says."""
        if b'"payload_uri":"blob:' in envelope:
            self.fed.payloads.put(payload)
            payload = b""
        self.fed.log.append(TOPIC, key=client.encode(), value=payload, headers={HEADER: envelope})

    def turn(self) -> None:
        """Close a round: cut, fold, gate, approval; note the losses of the champion."""
        if not self.losses:
            self.losses.append(self.world.judge(self.fed, self.champion))
        self.settled.append(approve(self.fed, fold_updates(self.fed, take_updates(self.fed))))
        self.losses.append(self.world.judge(self.fed, self.champion))

    def loss(self, clients: Iterable[str], after: int = -1) -> float:
        """Return the mean held-out loss of some devices, nats per token; `after` round 0 is version 1."""
        return float(np.mean([self.losses[after][client] for client in clients]))


def approve(fed: Federation, candidate: CandidateRef) -> Settled:
    """Bring a candidate through the automatic gate and, if it passed, make it champion."""
    settled = settle_candidate(fed, candidate)
    if settled.status == "head":
        decide(fed, settled, "approve", "flag")
    return settled

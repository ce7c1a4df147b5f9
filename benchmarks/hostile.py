"""What hostile devices can do: three of ten, ten attacks over the real wire, several seeds.

    python -m benchmarks.hostile [--seeds 5 6 7] [--rounds 3] [--only NAME …] [--aggregation '{"rule": "multi_krum"}']

A run is a real federation (`world.py`): real local training, signed envelopes, log, admission, probe, clip, rule, fold,
gate, approval. Attackers hold registered keys, know the model and everything the honest devices send in the round, and
put on the log what they like. Judged is the mean loss of the seven honest devices on held-out lines that neither
devices nor tier 1 have seen:

    kept = (base − attacked) / (base − clean)            clean: the same federation with ten honest devices

The attacks: flipped and scaled updates; NaN; 10¹² tokens claimed for nonsense; replayed records, also signed anew;
bases that do not exist, digests that are not theirs; two contents for one sequence number; a lone device's write into
an expert that nobody else adapts (after Bagdasaryan et al. 2020, arXiv 1807.00459); and collusion: "a little is
enough" (Baruch et al. 2019, arXiv 1902.06156), all three at mean − z·std, and inner product manipulation (Xie et al.
2020, arXiv 1903.03936), all three at −ε·mean.

More than 100 % is possible: seven honest devices fit their own text better without three others', hostile or not.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from benchmarks.world import Run, Sizes, Trained, World, key_of, seed_of
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, encode
from fednested_lib.envelope import INLINE_LIMIT_BYTES, make_envelope
from fednested_lib.partition import expert_param
from fednested_lib.signing import sha256_hex
from fednested_lib.snapshot import read_slice

Record = tuple[str, bytes, bytes]  # (client whose topic key it has, envelope, payload)
N_HOSTILE = 3
WEIGHT = 10**12
ALIE_Z = 1.5
IPM_EPSILON = 0.5
SHARED = (0, 1, 2, 3, 4)  # experts that honest devices adapt where the attackers are alone on another
LONE = (5, 6, 7)


@dataclass
class Situation:
    """What the attackers know in a round.

    Args:
        run: the federation.
        number: of the round, from 0 on.
        hostile: their names.
        own: what honest training gives each of them.
        first: what honest training gave each of them in round 0.
        others: what the honest devices send in this round.
        records: everything on the log before the attackers', in order; over all rounds.
    """

    run: Run
    number: int
    hostile: Sequence[str]
    own: Mapping[str, Trained]
    first: Mapping[str, Trained]
    others: Sequence[Trained]
    records: list[Record]

    def sign(self, client: str, delta: Delta, tokens: Mapping[int, list[int]], slot: int = 0, **changes: Any) -> Record:
        """Return a well-formed record that says what an attacker wants it to say."""
        base = self.run.champion
        payload = changes.pop("payload", None) or encode(delta, encoding="fp32", seed=0)
        digest = sha256_hex(payload)
        layers = {expert_param(name)[0]: factors.expert_ids for name, factors in delta.factors.items()}
        fields = {
            "federation": self.run.fed.config.federation,
            "client_id": client,
            "key_epoch": 0,
            "sequence": 100 * self.number + slot,
            "base_version": base.version,
            "base_digest": base.base_digest,
            "adapter": {"rank": delta.spec.rank, "alpha": float(delta.spec.alpha), "mode": "lora"},
            "expert_ids": {str(layer): list(ids) for layer, ids in layers.items()},
            "tokens": {str(layer): list(tokens[layer]) for layer in layers},
            "num_examples": 64,
            "encoding": "fp32",
            "payload_sha256": digest,
            "payload_bytes": len(payload),
            "payload_uri": f"blob:{digest}" if len(payload) > INLINE_LIMIT_BYTES else None,
            **changes,
        }
        return client, make_envelope(key_of(client), **fields).to_bytes(), payload

    def train_on(self, client: str, rows: np.ndarray, experts: tuple[int, ...] | None = None) -> Trained:
        """Train on text of the attacker's choice."""
        world = self.run.world
        return world.train(self.run.fed, self.run.champion, client, self.number, experts=experts, rows=rows)

    def text(self, client: str) -> np.ndarray:
        """Return an attacker's own text."""
        return self.run.world.rows_of(self.run.fed, self.run.champion.snapshot, client)


Attack = Callable[[Situation], list[Record]]


def scaled(delta: Delta, factor: float) -> Delta:
    """Return factor · ΔW."""
    factors = {
        name: ExpertFactors(
            expert_ids=each.expert_ids, lora_a=each.lora_a, lora_b=(each.lora_b * factor).astype(np.float32)
        )
        for name, each in delta.factors.items()
    }
    return Delta(spec=delta.spec, factors=factors)


def sign_flip(now: Situation) -> list[Record]:
    """Send −ΔW."""
    return [now.sign(client, scaled(now.own[client].delta, -1), now.own[client].routed) for client in now.hostile]


def times_100(now: Situation) -> list[Record]:
    """Send 100·ΔW."""
    return [now.sign(client, scaled(now.own[client].delta, 100), now.own[client].routed) for client in now.hostile]


def nan(now: Situation) -> list[Record]:
    """Send NaN in every factor."""
    import cramjam
    from safetensors.numpy import save

    records = []
    for client in now.hostile:
        delta = now.own[client].delta
        tensors = {
            f"{name}.{factor}": np.full_like(getattr(each, factor), np.nan)
            for name, each in delta.factors.items()
            for factor in ("lora_a", "lora_b")
        }
        payload = bytes(cramjam.zstd.compress(save(tensors), level=3))
        records.append(now.sign(client, delta, now.own[client].routed, payload=payload))
    return records


def weight(now: Situation) -> list[Record]:
    """Train on shuffled tokens and claim 10¹² of them for every expert."""
    records = []
    for client in now.hostile:
        rng = np.random.default_rng(seed_of("shuffle", client, now.number))
        trained = now.train_on(client, rng.permuted(now.text(client), axis=1))
        claimed = {layer: [WEIGHT] * len(counts) for layer, counts in trained.routed.items()}
        records.append(now.sign(client, trained.delta, claimed))
    return records


def replay(now: Situation) -> list[Record]:
    """Send every record of this and earlier rounds again, and the own first update under new numbers."""
    mine = [now.sign(client, now.own[client].delta, now.own[client].routed) for client in now.hostile]
    again = [now.sign(client, now.first[client].delta, now.own[client].routed, slot=1) for client in now.hostile]
    return [*mine, *now.records, *mine, *again]


def forged_base(now: Situation) -> list[Record]:
    """Claim a version that does not exist, another version's digest, and somebody else's name."""
    records = []
    for client in now.hostile:
        delta, tokens = scaled(now.own[client].delta, -1), now.own[client].routed
        records += [
            now.sign(client, delta, tokens, slot=0, base_version=1_000_000),
            now.sign(client, delta, tokens, slot=1, base_digest="0" * 64),
            now.sign(client, delta, tokens, slot=2, base_version=0),
        ]
    return records


def equivocation(now: Situation) -> list[Record]:
    """Give one sequence number two contents: −ΔW first, then ΔW."""
    return [
        now.sign(client, scaled(now.own[client].delta, sign), now.own[client].routed)
        for client in now.hostile
        for sign in (-1, 1)
    ]


def backdoor(now: Situation) -> list[Record]:
    """Be the only device on an expert; learn there that everything goes on with one line, and send 30 times that."""
    records = []
    for client, expert in zip(now.hostile, LONE, strict=True):
        line = np.repeat(now.text(client)[:1], 8, axis=0)
        trained = now.train_on(client, line, (expert,))
        tokens = {layer: [1 << 12] * len(counts) for layer, counts in trained.routed.items()}
        records.append(now.sign(client, scaled(trained.delta, 30), tokens))
    return records


def small_shift(now: Situation) -> list[Record]:
    """Send mean − z·std of the honest updates, all alike."""
    return _colluding(now, lambda x: x.mean(axis=0) - ALIE_Z * x.std(axis=0))


def inner_product(now: Situation) -> list[Record]:
    """Send −ε·mean of the honest updates, all alike."""
    return _colluding(now, lambda x: -IPM_EPSILON * x.mean(axis=0))


def _colluding(now: Situation, combine: Callable[[np.ndarray], np.ndarray]) -> list[Record]:
    """Send a dense function of the honest updates, exactly: with A = 1 the factors have full rank."""
    factors = {}
    for name in now.others[0].delta.factors:
        each = [trained.delta.factors[name] for trained in now.others]
        scale = now.others[0].delta.spec.scale
        n, _, d_in = each[0].lora_a.shape
        dense = combine(np.stack([scale * np.matmul(f.lora_b, f.lora_a, dtype=np.float64) for f in each]))
        eye = np.repeat(np.eye(d_in, dtype=np.float32)[None], n, axis=0)
        factors[name] = ExpertFactors(expert_ids=each[0].expert_ids, lora_a=eye, lora_b=dense.astype(np.float32))
    delta = Delta(spec=AdapterSpec(rank=d_in, alpha=float(d_in)), factors=factors)
    return [now.sign(client, delta, now.own[client].routed) for client in now.hostile]


ATTACKS: dict[str, Attack] = {
    "sign flip": sign_flip,
    "x100": times_100,
    "NaN": nan,
    "weight 10^12": weight,
    "replay": replay,
    "forged base": forged_base,
    "equivocation": equivocation,
    "lone-expert backdoor": backdoor,
    "small shift": small_shift,
    "inner product": inner_product,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: loss of the honest devices before and after, refused records, rounds that the gate stopped."""

    base: float
    loss: float
    refused: Mapping[str, int]
    stopped: int
    non_finite: int
    curve: tuple[float, ...] = field(default=())

    @property
    def gain(self) -> float:
        """What the run improved, nats per token."""
        return self.base - self.loss


def play(world: World, name: str, attack: Attack | None, *, rounds: int, aggregation: Mapping | None = None) -> Outcome:
    """Play one history: honest devices send, attackers send, tier 1 closes the round."""
    run = Run(world, name, aggregation)
    hostile = sorted(np.random.default_rng(seed_of("hostile", world.seed)).choice(world.clients, N_HOSTILE, False))
    honest = [client for client in world.clients if client not in hostile]
    sparse = attack is backdoor or name.startswith("sparse")
    records: list[Record] = []
    first: dict[str, Trained] = {}
    for number in range(rounds):
        experts = SHARED if sparse else None
        sending = honest if attack else world.clients
        trained = {client: run.honest(client, 100 * number, experts) for client in sending}
        records += [(client, *run.sealed(client, 100 * number, each)) for client, each in trained.items()]
        sent = records[-len(trained) :]
        if attack:
            own = {} if sparse else {client: run.honest(client, 100 * number) for client in hostile}
            first = first or own
            now = Situation(
                run=run,
                number=number,
                hostile=hostile,
                own=own,
                first=first,
                others=[trained[client] for client in honest],
                records=list(records),
            )
            sent = sent + attack(now)
        for record in sent:
            run.append(*record)
        run.turn()
    return _outcome(run, honest)


def _outcome(run: Run, honest: Sequence[str]) -> Outcome:
    state = run.fed.chain.state()
    candidates = [
        sealed.entry.body.candidate for sealed in run.fed.chain.entries() if hasattr(sealed.entry.body, "candidate")
    ]
    return Outcome(
        base=run.loss(honest, 0),
        loss=run.loss(honest),
        refused=Counter(row.reason for candidate in candidates for row in candidate.refused),
        stopped=sum(settled.status != "head" for settled in run.settled),
        non_finite=sum(not _finite(run, view.blobs) for view in state.versions.values()),
        curve=tuple(run.loss(honest, after) for after in range(len(run.losses))),
    )


def _finite(run: Run, blobs: Mapping[str, str]) -> bool:
    return all(
        np.isfinite(array).all()
        for key, digest in blobs.items()
        for array in read_slice(key, digest, run.fed.blobs).values()
    )


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything of one seed: clean runs (all experts shared, and as in the lone-expert attack), then the attacks."""

    seed: int
    mean: Outcome  # clean, weighted mean of the clipped updates
    clean: Outcome
    sparse: Outcome | None  # where no attack needs it
    attacked: Mapping[str, Outcome]

    def clean_of(self, attack: str) -> Outcome:
        """Return the clean run that an attack is compared with."""
        if ATTACKS[attack] is not backdoor:
            return self.clean
        assert self.sparse is not None, "played with the attack"
        return self.sparse

    def kept(self, attack: str) -> float:
        """Return the share of the clean run's gain that is left, in percent."""
        return 100 * self.attacked[attack].gain / self.clean_of(attack).gain

    @property
    def worst(self) -> float:
        """Return what is kept under the worst attack, in percent."""
        return min(map(self.kept, self.attacked))

    @property
    def outcomes(self) -> list[Outcome]:
        """Return all runs."""
        return [self.mean, self.clean, *([self.sparse] if self.sparse else []), *self.attacked.values()]

    @property
    def clean_kept(self) -> float:
        """Return what a clean run of the pipeline keeps of the weighted mean's gain, in percent."""
        return 100 * self.clean.gain / self.mean.gain


def measure(
    seed: int,
    *,
    rounds: int = 3,
    attacks: Sequence[str] = tuple(ATTACKS),
    aggregation: Mapping | None = None,
    sizes: Sizes = Sizes(),  # noqa: B008  frozen
    tell: Callable[[str], None] = lambda _line: None,
) -> Results:
    """Play all runs of one seed.

    Args:
        seed: of text, first weights, local training and the choice of attackers.
        rounds: of every run.
        attacks: names of `ATTACKS`.
        aggregation: settings to judge; None: those of a new workspace.
        sizes: of the world.
        tell: gets one line per run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        world = World(Path(scratch), seed, sizes)

        def run(name: str, attack: Attack | None, settings: Mapping | None) -> Outcome:
            outcome = play(world, name, attack, rounds=rounds, aggregation=settings)
            tell(f"seed {seed}  {name:<22} {' '.join(f'{loss:.4f}' for loss in outcome.curve)}  {_facts(outcome)}")
            return outcome

        return Results(
            seed=seed,
            mean=run("clean weighted mean", None, {}),
            clean=run("clean", None, aggregation),
            sparse=run("sparse clean", None, aggregation) if backdoor in map(ATTACKS.get, attacks) else None,
            attacked={name: run(name, ATTACKS[name], aggregation) for name in attacks},
        )


def _facts(outcome: Outcome) -> str:
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.refused.items()))
    return "; ".join(filter(None, [refused, f"{outcome.stopped} rounds stopped" if outcome.stopped else ""]))


def table(results: Sequence[Results]) -> str:
    """Return base, clean and attacked loss of every attack and seed, what is kept, and why records were refused."""
    lines = [f"{'attack':<22} {'seed':>4} {'base':>7} {'clean':>7} {'attacked':>8} {'kept':>7}  refused"]
    for each in results:
        mean = f"{'(no attack)':<22} {each.seed:>4} {each.mean.base:7.4f} {each.mean.loss:7.4f} {each.clean.loss:8.4f}"
        lines.append(f"{mean} {each.clean_kept:6.1f}%  clean column: weighted mean; {_facts(each.clean)}")
    for name in results[0].attacked:
        for each in results:
            outcome, clean = each.attacked[name], each.clean_of(name)
            lines.append(
                f"{name:<22} {each.seed:>4} {outcome.base:7.4f} {clean.loss:7.4f} {outcome.loss:8.4f} "
                f"{each.kept(name):6.1f}%  {_facts(outcome)}"
            )
    worst, clean = min(each.worst for each in results), min(each.clean_kept for each in results)
    broken = sum(outcome.non_finite for each in results for outcome in each.outcomes)
    lines.append(f"kept at worst {worst:.1f} %, clean {clean:.1f} %, versions with NaN or infinity: {broken}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7, 8, 9])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--aggregation", type=json.loads, help="settings as JSON; default: those of a new workspace")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    found = [
        measure(
            seed,
            rounds=options.rounds,
            attacks=options.only,
            aggregation=options.aggregation,
            tell=lambda line: print(line, flush=True),
        )
        for seed in options.seeds
    ]
    print("\n" + table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

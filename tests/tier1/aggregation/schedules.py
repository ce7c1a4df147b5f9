"""Random schedules for the conformance suite, run through the product: envelopes, admission, fold, in memory.

A schedule is a model, a pipeline and a few cuts of a log: clients with ranks 1 to 64 adapt subsets of experts from any
version so far, send twice from one base, repeat themselves, say another thing under the same number, and arrive in any
order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fednested_lib.blobs import BlobStore
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, encode
from fednested_lib.envelope import HEADER, INLINE_LIMIT_BYTES, make_envelope
from fednested_lib.log import Record
from fednested_lib.signing import Signer, sha256_hex
from fednested_lib.snapshot import SLICE_TENSOR, SnapshotManifest, decode_blob, encode_blob, expert_shapes, slice_key
from tests.oracle import Pipeline, Sent
from tier1.config import DeviceRecord
from tier1.versions.admission import admit
from tier1.versions.build import fold_candidate
from tier1.versions.manifest import Candidate, Cut, Entry, Genesis, Inputs, Version
from tier1.versions.settings import AggregationSettings, Rates
from tier1.versions.state import ChainState, Sealed, derive

MODEL = {
    "model_type": "mixtral",
    "num_local_experts": 3,
    "hidden_size": 6,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
}
SHAPES = expert_shapes(SnapshotManifest(version=0, family="mixtral", model_config=MODEL, tokenizer="0" * 64, blobs={}))
CLIENTS = ("ann", "bob", "cyd", "dee", "eve", "fay", "gus")
KEYS = {client: Signer.from_seed(bytes.fromhex(sha256_hex(client.encode()))) for client in CLIENTS}
DEVICES = {client: DeviceRecord(public_key=key.public_key) for client, key in KEYS.items()}
TOPIC = "updates.experts.local"
GRAM_RULES = ("krum", "multi_krum", "geometric_median", "centred_clipping", "foolsgold", "fltrust")
DENSE_RULES = ("coordinate_median", "trimmed_mean")


class MemoryBlobs(BlobStore):
    """A blob store in a dictionary: the directory listings of fsspec's cost more than the schedules."""

    def __init__(self):
        super().__init__("memory")
        self._held: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        digest = sha256_hex(data)
        self._held[digest] = data
        return digest

    def get(self, digest: str, max_bytes: int | None = None) -> bytes:
        return self._held[digest]

    def has(self, digest: str) -> bool:
        return digest in self._held

    def forget(self, kept: set[str]) -> None:
        """Drop every other blob."""
        self._held = {digest: self._held[digest] for digest in kept}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One send: everything but the digest of its base, which only a run knows."""

    client: str
    sequence: int
    base: int
    delta: Delta
    experts: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What happens, cut by cut, and the pipeline that folds it."""

    genesis: Mapping[str, np.ndarray]
    cuts: Sequence[Sequence[Planned]]
    settings: AggregationSettings
    eta: float


def random_delta(rng: np.random.Generator, experts: Sequence[int], like: Delta | None = None) -> Delta:
    """Draw a delta; with `like`, one that differs from it by a thousandth."""
    if like is not None:
        factors = {
            name: ExpertFactors(
                expert_ids=f.expert_ids,
                lora_a=f.lora_a,
                lora_b=f.lora_b + (1e-3 * rng.normal(0, 0.3, f.lora_b.shape)).astype(np.float32),
            )
            for name, f in like.factors.items()
        }
        return Delta(spec=like.spec, factors=factors)
    rank = int(rng.choice([1, 2, 3, 8, 17, 64]))
    factors = {
        name: ExpertFactors(
            expert_ids=tuple(experts),
            lora_a=rng.normal(size=(len(experts), rank, d_in)).astype(np.float32),
            lora_b=rng.normal(0, 0.3, size=(len(experts), d_out, rank)).astype(np.float32),
        )
        for name, (_, d_out, d_in) in SHAPES.items()
    }
    return Delta(spec=AdapterSpec(rank=rank, alpha=float(rng.uniform(0.5, 2))), factors=factors)


def random_schedule(seed: int, rules: Sequence[str] | None = None) -> Schedule:
    """Draw a schedule."""
    rng = np.random.default_rng(seed)
    genesis = {
        slice_key(name, expert): rng.normal(size=shape[1:]).astype(np.float32)
        for name, shape in SHAPES.items()
        for expert in range(shape[0])
    }
    alike = rng.random() < 0.25
    template = random_delta(rng, range(3)) if alike else None
    sequences, sent, cuts = dict.fromkeys(CLIENTS, 0), [], []
    for number in range(int(rng.integers(1, 4))):
        cut: list[Planned] = []
        for _ in range(int(rng.integers(1, 8))):
            client = str(rng.choice(CLIENTS))
            experts = range(3) if alike else sorted(rng.choice(3, int(rng.integers(1, 4)), replace=False).tolist())
            planned = Planned(
                client=client,
                sequence=sequences[client],
                base=int(rng.integers(0, number + 1)),  # a version ≤ the number of cuts so far; checked against head
                delta=random_delta(rng, experts, template),
                experts=tuple(experts),
                tokens=tuple(int(rng.choice([0, 16, 128, 1024, 1 << 40])) for _ in experts),
            )
            sequences[client] += 1
            cut.append(planned)
            sent.append(planned)
            if rng.random() < 0.2:
                cut.append(sent[int(rng.integers(len(sent)))])  # an old record once more
        cuts.append([cut[i] for i in rng.permutation(len(cut))])
    return Schedule(
        genesis=genesis, cuts=cuts, settings=random_settings(rng, rules), eta=float(rng.choice([1.0, 0.5, 2.0]))
    )


def random_settings(rng: np.random.Generator, rules: Sequence[str] | None) -> AggregationSettings:
    """Draw a pipeline."""
    rule = str(rng.choice(rules or ("weighted_mean", *GRAM_RULES, *DENSE_RULES)))
    options = {
        "krum": {"f": int(rng.integers(0, 2))},
        "multi_krum": {"f": int(rng.integers(0, 2)), "m": int(rng.integers(1, 4))},
        "geometric_median": {"iterations": 16},
        "trimmed_mean": {"f": 1},
    }.get(rule, {})
    return AggregationSettings(
        max_norm=float(rng.choice([2.0, 8.0, 50.0])),
        token_cap=500,
        staleness=str(rng.choice(["polynomial", "hinge", "constant"], p=[0.6, 0.2, 0.2])),
        hinge_delay=int(rng.integers(0, 2)),
        hinge_slope=0.7,
        max_staleness=int(rng.integers(1, 4)),
        min_mass_tokens=int(rng.choice([50, 300])),
        min_coverage=int(rng.integers(1, 3)),
        mass_ratio=[None, 0.3, 1.0][int(rng.integers(3))],
        rule=rule,
        rule_options=options,
        root="ann" if rule == "fltrust" else None,
    )


def pipeline_of(schedule: Schedule) -> Pipeline:
    """Tell the oracle the same settings."""
    settings = schedule.settings
    names = ("max_norm", "token_cap", "staleness", "hinge_delay", "hinge_slope", "max_staleness", "min_mass_tokens")
    return Pipeline(
        eta=schedule.eta,
        exponent=settings.staleness_exponent,
        min_coverage=settings.min_coverage,
        mass_ratio=settings.mass_ratio,
        rule=settings.rule,
        options=dict(settings.rule_options),
        root=settings.root,
        **{name: getattr(settings, name) for name in names},
    )


@dataclass
class Run:
    """The product's run of a schedule: chain state, stored weights, and what the oracle must be told."""

    schedule: Schedule
    sealed: list[Sealed] = field(default_factory=list)
    bases: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self.blobs = MemoryBlobs()
        blobs = {key: self.blobs.put(encode_blob({SLICE_TENSOR: m})) for key, m in self.schedule.genesis.items()}
        self.seal(
            Genesis(
                federation="f", family="mixtral", model=MODEL, tokenizer="0" * 64, blobs=blobs,
                profile={"torch": "t", "instruction_set": "i"}, trainer="t", created_at="2026-01-01T00:00:00+00:00",
            )
        )  # fmt: skip

    def seal(self, body) -> None:
        """Append an entry to the chain in memory."""
        prev = self.sealed[-1].digest if self.sealed else None
        entry = Entry(seq=len(self.sealed), prev=prev, body=body, signer="0" * 64, signature="0" * 128)
        self.sealed.append(Sealed(entry, entry.digest()))

    def state(self) -> ChainState:
        """Derive the state."""
        return derive(self.sealed)

    def record(self, planned: Planned, offset: int) -> tuple[Record, Sent]:
        """Sign a send as the record of the log, and say the same to the oracle."""
        view = self.state_now.versions[min(planned.base, self.state_now.head.version)]
        payload = encode(planned.delta, encoding="fp32", seed=0)
        envelope = make_envelope(
            KEYS[planned.client],
            federation="f",
            client_id=planned.client,
            key_epoch=0,
            sequence=planned.sequence,
            base_version=view.version,
            base_digest=view.base_digest,
            adapter={"rank": planned.delta.spec.rank, "alpha": planned.delta.spec.alpha, "mode": "lora"},
            expert_ids={"0": list(planned.experts)},
            tokens={"0": list(planned.tokens)},
            num_examples=8,
            encoding="fp32",
            payload_sha256=sha256_hex(payload),
            payload_bytes=len(payload),
            payload_uri=f"blob:{self.blobs.put(payload)}" if len(payload) > INLINE_LIMIT_BYTES else None,
        )
        self.bases[envelope.update_id] = view.version
        value = b"" if envelope.payload_uri else payload
        record = Record(
            topic=TOPIC, partition=0, offset=offset, key=b"", value=value, headers=((HEADER, envelope.to_bytes()),)
        )
        factors = {
            slice_key(name, expert): (f.lora_a[i], f.lora_b[i])
            for name, f in planned.delta.factors.items()
            for i, expert in enumerate(f.expert_ids)
        }
        sent = Sent(
            client=planned.client,
            sequence=planned.sequence,
            base=view.version,
            order=envelope.update_id,
            scale=planned.delta.spec.scale,
            factors=factors,
            tokens={(0, e): n for e, n in zip(planned.experts, planned.tokens, strict=True)},
        )
        return record, sent

    def go(self, fold: Callable[..., Candidate] = fold_candidate) -> list[list[Sent]]:
        """Run every cut; return what was sent, for the oracle."""
        offset, told = 0, []
        made: dict[int, tuple[Record, Sent]] = {}
        for cut in self.schedule.cuts:
            self.state_now = self.state()
            for planned in cut:
                if id(planned) not in made:
                    made[id(planned)] = self.record(planned, 0)
            pairs = [made[id(planned)] for planned in cut]
            records = [
                Record(topic=TOPIC, partition=0, offset=offset + i, key=b"", value=r.value, headers=r.headers)
                for i, (r, _) in enumerate(pairs)
            ]
            told.append([sent for _, sent in pairs])
            self.fold(records, offset, fold)
            offset += len(records)
        return told

    def fold(self, records: Sequence[Record], start: int, fold: Callable[..., Candidate]) -> None:
        """Admit and fold one cut; a cut without an acceptable update makes no version."""
        settings, state = self.schedule.settings, self.state_now
        admission = admit(records, state, devices=DEVICES, settings=settings, payloads=self.blobs, archive=self.blobs)
        start = state.offsets.get("0", 0)
        end = start + 1  # ranges of the chain only have to follow each other
        cut = Cut(topic=TOPIC, log_id="l", ranges={"0": (start, end)}, records_digest="0" * 64, n_records=len(records))
        if not admission.updates:
            return
        candidate = fold(
            state.head, Inputs(cut=cut), admission, rates=Rates(eta_t2=self.schedule.eta), settings=settings,
            blobs=self.blobs, archive=self.blobs, trainer="t", authorisation="a",
        )  # fmt: skip
        self.seal(
            Version(
                version=state.head.version + 1, candidate=candidate, tries=[], offsets={"0": end},
                created_at="2026-01-01T00:00:00+00:00",
            )
        )  # fmt: skip

    def weights(self, version: int) -> dict[str, np.ndarray]:
        """Read the weights of a version."""
        view = self.state().versions[version]
        return {key: decode_blob(self.blobs.get(digest))[SLICE_TENSOR] for key, digest in view.blobs.items()}

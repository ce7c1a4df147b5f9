"""The server's attack on one update: which tokens of the vocabulary did the device train on?

    rows     B = −η·s·Σ_t g_t·(A·x_t)ᵀ     token v was there if A·x_v lies in the row space of B        (k < r tokens)
    starts   ΔA = A − A₀ ≈ Σ_t c_t·x_tᵀ    … if x_v lies in the row space of ΔA                         (mode lora)
    labels   B_down = Σ_t g_t·(A·h_t)ᵀ     … if W_U[v], the gradient's direction at label v, lies along its columns

The first is the dictionary attack on a gradient (DAGER, Petrov et al. 2024, arXiv 2405.15586) for an adapter of rank r:
exact below r distinct tokens, blind above. The other two are statistical: they project a dictionary of d-dimensional
directions on r ≪ d measured ones, and a token's share sinks only as √r·d/k. The server knows the frozen model, so it
has every token's input x_v to the experts of both layers, exact when nothing is mixed by attention (rows of one token)
and otherwise the token's without context. A₀ it does not know: it follows from a secret of the device, and the best
guess is its mean, zero. With `start_known` the attack is what it was when A₀ followed from names in the envelope.

A token counts as found when its score exceeds the 99th percentile of tokens that the device never had (half of the
vocabulary), and what is reported is the share found beyond that chance of one per cent. Training, release and decoding
are the product's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from fednested_lib.adapters import attach
from fednested_lib.delta import AdapterSpec, Delta, decode
from fednested_lib.envelope import AdapterFields
from fednested_lib.partition import expert_name, expert_param
from fednested_lib.policy import Policy
from fednested_lib.sidecar import make_update
from fednested_lib.signing import Signer
from fednested_lib.spool import Declaration
from fednested_lib.training import train_adapters
from tests.policies import make_policy

D_MODEL, D_HIDDEN, N_EXPERTS, TOP_K, N_LAYERS, VOCABULARY = 256, 128, 4, 2, 2, 16384
N_NULL = VOCABULARY // 2  # tokens 0..N_NULL-1 are in no device's text: the threshold's calibration
CHANCE = 0.01
Counts = dict[int, list[int]]  # layer → one number per expert
A_SEED = "a" * 32


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device trained on: `distinct` tokens, drawn alike, in rows of `seq_len`; and how.

    One SGD step is the worst case that DESIGN forbids, AdamW what the product does.
    """

    distinct: int
    rank: int
    seq_len: int = 1
    sgd: bool = False
    mode: str = "lora"
    steps: int = 10
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The trainer's result: exact factors, those it started from, and the truth that the attack is judged by."""

    device: Device
    delta: Delta
    start: Delta
    seen: dict[int, np.ndarray]  # layer → [experts, vocabulary], token was routed there
    labels: np.ndarray

    @property
    def distinct(self) -> Counts:
        """Distinct tokens per layer and expert."""
        return {layer: seen.sum(1).tolist() for layer, seen in self.seen.items()}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Share of true tokens found beyond chance, and of the found ones that are true; `distinct` tokens were there."""

    attack: str
    layer: int
    distinct: float
    share: float
    precision: float


@functools.cache
def victim() -> MixtralForCausalLM:
    """Return the frozen model that server and device share; random embeddings are the easiest to tell apart."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=D_MODEL,
        intermediate_size=D_HIDDEN,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=N_EXPERTS,
        num_experts_per_tok=TOP_K,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return MixtralForCausalLM(config).eval()


@functools.cache
def dictionary() -> dict[int, np.ndarray]:
    """Return layer → what its experts get for each token by itself [vocabulary, d], unit rows."""
    found: dict[int, np.ndarray] = {}

    def keep(layer: int) -> Callable:
        def hook(_module, args, _kwargs) -> None:
            found[layer] = _unit(args[0].detach().reshape(-1, D_MODEL).numpy())

        return hook

    layers = victim().model.layers
    hooks = [
        layers[i].mlp.experts.register_forward_pre_hook(keep(i), with_kwargs=True) for i in range(N_LAYERS)
    ]  # fmt: skip
    with torch.inference_mode():
        victim().model(torch.arange(VOCABULARY)[:, None])
    for hook in hooks:
        hook.remove()
    return found


@functools.cache
def unembedding() -> np.ndarray:
    """Return the direction that a label's gradient takes, per token, unit rows."""
    return _unit(victim().lm_head.weight.detach().numpy())


@functools.cache
def train(device: Device) -> Trained:
    """Train a device's adapters on its tokens."""
    rng = np.random.default_rng([device.seed, device.distinct, device.seq_len])
    tokens = rng.choice(np.arange(N_NULL, VOCABULARY), device.distinct, replace=False)
    n_rows = max(8, -(-device.distinct // device.seq_len))
    rows = tokens[rng.integers(len(tokens), size=(n_rows, device.seq_len + 1))]
    rows[:, :-1].flat[: len(tokens)] = tokens  # every token at least once
    spec = AdapterSpec(
        rank=device.rank,
        alpha=2.0 * device.rank,
        mode=device.mode,
        seed=A_SEED if device.mode == "fixed_a" else None,
    )
    adapters = attach(victim(), spec, None, seed=device.seed)
    start = adapters.to_delta()
    start = Delta(spec=spec, factors={n: _copy(f) for n, f in start.factors.items()})
    if device.sgd:
        optimizer = torch.optim.SGD(list(adapters.parameters()), lr=1.0)
        batch = torch.from_numpy(rows)
        logits = victim()(input_ids=batch[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    else:
        batch = max(4, -(-2 * n_rows // device.steps))  # two epochs
        how = {"steps": device.steps, "batch_size": batch, "learning_rate": 4e-3, "seed": device.seed}
        train_adapters(victim(), adapters, rows.astype(np.int32), **how)
    delta = Delta(spec=spec, factors={name: _copy(f) for name, f in adapters.to_delta().factors.items()})
    seen = {layer.layer: layer.seen_nv.numpy().copy() for layer in adapters._layers}
    return Trained(
        device=device, delta=delta, start=start, seen=seen, labels=np.unique(rows[:, 1:])
    )  # fmt: skip


def _copy(factors):
    return type(factors)(
        expert_ids=factors.expert_ids, lora_a=factors.lora_a.copy(), lora_b=factors.lora_b.copy()
    )  # fmt: skip


def shapes_of(delta: Delta) -> dict[str, tuple[int, int, int]]:
    """Return the shapes of the fused expert parameters, all of whose experts the delta adapts."""
    return {
        name: (len(f.expert_ids), f.lora_b.shape[1], f.lora_a.shape[2]) for name, f in delta.factors.items()
    }  # fmt: skip


def send(delta: Delta, distinct: Counts, *, floor_per_rank: int, floor_per_width: int | None = None) -> Delta:
    """Send an update as the sidecar does, with these floors (0: none), and read it as the server does."""
    floors = {"min_tokens_per_rank": floor_per_rank, "min_tokens_per_width": floor_per_width}
    policy = make_policy().model_copy(update=floors)  # no policy may say 0
    return _received(delta, distinct, policy, 0)


def send_noised(
    delta: Delta, distinct: Counts, *, clip_norm: float, noise_multiplier: float, sequence: int = 0
) -> Delta:
    """Send an update under differential privacy, no expert withheld, and read it as the server does."""
    how = {"clip_norm": clip_norm, "noise_multiplier": noise_multiplier, "epsilon_total": 1e6, "delta": 1e-5}
    adapter = {"mode": "fixed_a", "rank": delta.spec.rank, "alpha": delta.spec.alpha}
    return _received(delta, distinct, make_policy(dp=how, adapters=[adapter], telemetry="off"), sequence)


def _received(delta: Delta, distinct: Counts, policy: Policy, sequence: int) -> Delta:
    spec = delta.spec
    ids = {str(expert_param(name)[0]): list(factors.expert_ids) for name, factors in delta.factors.items()}
    counts = {layer: distinct[int(layer)] for layer in ids}
    declaration = Declaration(
        sequence=sequence,
        base_version=1,
        base_digest="0" * 64,
        adapter=AdapterFields(rank=spec.rank, alpha=spec.alpha, mode=spec.mode, seed=spec.seed),
        expert_ids=ids,
        routed_tokens=counts,
        distinct_tokens=counts,
        num_examples=1,
        factors_sha256="0" * 64,
    )
    signer = Signer.from_seed(bytes(32))
    who = {"federation": "fednested", "client_id": "device", "key_epoch": 0, "signer": signer}
    made = make_update(declaration, delta, policy=policy, encoding="int8", **who)
    envelope = made.envelope
    read = {"encoding": envelope.encoding, "spec": envelope.adapter.spec(), "expert_ids": envelope.layers()}
    return decode(made.payload, **read, shapes=shapes_of(delta))


def attack(trained: Trained, sent: Delta, *, start_known: bool = False) -> Iterator[Found]:
    """Run every attack on what was sent; experts that were sent as zeros tell nothing.

    Args:
        trained: the device, to know the truth.
        sent: what the server holds.
        start_known: give the server A₀.

    Yields:
        One result per attack and expert (`rows`, `starts`) or layer (`labels`: all its experts' evidence together).
    """
    for layer in range(N_LAYERS):
        up, down = (sent.factors[expert_name(layer, name)] for name in ("gate_up_proj", "down_proj"))
        start = trained.start.factors[expert_name(layer, "gate_up_proj")]
        evidence, counts = np.zeros(VOCABULARY), []
        for expert in range(N_EXPERTS):
            n_distinct, used = trained.distinct[layer][expert], trained.seen[layer][expert]
            if not n_distinct or not up.lora_b[expert].any():
                continue
            inputs = dictionary()[layer]
            images = _unit(inputs @ up.lora_a[expert].T)
            yield _found("rows", layer, n_distinct, _share_in_span(up.lora_b[expert], images), used)
            if sent.spec.mode == "lora":
                moved = up.lora_a[expert] - (start.lora_a[expert] if start_known else 0)
                yield _found("starts", layer, n_distinct, _share_in_span(moved, inputs), used)
            evidence += _label_evidence(down.lora_b[expert])
            counts.append(n_distinct)
        if counts:
            labels = np.zeros(VOCABULARY, bool)
            labels[trained.labels] = True
            yield _found("labels", layer, float(np.mean(counts)), evidence, labels)


def _label_evidence(lora_b: np.ndarray) -> np.ndarray:
    """Return how much the columns of a down-projection's B point along each label; span and energy, in deviations."""
    energy = np.square(unembedding() @ lora_b).sum(1)
    return _standard(_share_in_span(lora_b.T, unembedding())) + _standard(energy)


def _share_in_span(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return ‖projection of each unit direction on the span of the rows‖²; a full span loses its smallest axis."""
    _, sizes, axes = np.linalg.svd(rows, full_matrices=False)
    rank = int((sizes > 0.02 * sizes[0]).sum())
    if rank == directions.shape[1]:
        rank -= 1
    return ((directions @ axes[:rank].T) ** 2).sum(1)


def _found(name: str, layer: int, n_distinct: float, score: np.ndarray, used: np.ndarray) -> Found:
    above = score > np.quantile(score[:N_NULL], 1 - CHANCE)
    hits, calls = float((above & used)[N_NULL:].sum()), float(above[N_NULL:].sum())
    share = max(0.0, (hits / used.sum() - CHANCE) / (1 - CHANCE))
    return Found(attack=name, layer=layer, distinct=n_distinct, share=share, precision=hits / calls if calls else 0.0)


def _standard(score: np.ndarray) -> np.ndarray:
    return (score - score[:N_NULL].mean()) / score[:N_NULL].std()


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def table(rank: int = 8) -> Iterator[str]:
    """Yield what docs/privacy.md shows: share found and precision, by tokens and attack, plain and noised."""
    for seq_len in (1, 16):
        yield f"rank {rank}, rows of {seq_len} tokens, AdamW, no floor: share found beyond chance (precision)"
        for distinct in (1, 4, 16, 64, 256, 1024, 4096):
            trained = train(Device(distinct=distinct, rank=rank, seq_len=seq_len))
            sent = send(trained.delta, trained.distinct, floor_per_rank=0)
            yield _line(f"k ~ {distinct}/device", attack(trained, sent))
            yield _line("  with A0 known", attack(trained, sent, start_known=True))
    yield f"rank {rank}, rows of 1 token, AdamW, fixed_a, clip 1, noise multiplier z, no floor"
    for noise_multiplier in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        for distinct in (16, 80, 320):
            trained = train(Device(distinct=distinct, rank=rank, mode="fixed_a"))
            found = [
                each
                for draw in range(-(-320 // distinct))
                for each in attack(trained, _noisy(trained, noise_multiplier, draw))
            ]
            yield _line(f"z = {noise_multiplier}, {distinct}/device", found)


def _noisy(trained: Trained, noise_multiplier: float, draw: int) -> Delta:
    how = {"clip_norm": 1.0, "noise_multiplier": noise_multiplier, "sequence": draw}
    return send_noised(trained.delta, trained.distinct, **how)


def _line(name: str, found: Iterable[Found]) -> str:
    groups: dict[str, list[Found]] = {}
    for each in found:
        groups.setdefault(f"{each.attack}{each.layer}", []).append(each)
    cells = [
        f"{key} {np.mean([f.share for f in each]):.0%} ({np.mean([f.precision for f in each]):.0%})"
        for key, each in sorted(groups.items())
    ]
    return f"  {name:24s} " + "  ".join(cells)


if __name__ == "__main__":
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    torch.set_num_threads(1)
    for line in table():
        print(line, flush=True)

"""A secret in a device's text: how much of it the model remembers after the fold.

    exposure(s) = log₂ |R| − log₂ rank(s)          s among |R| sequences of its form, by the model's log-perplexity
                                                    (Carlini et al. 2019, "The Secret Sharer", section 4.2)

Exposure of a secret that was never in the text is 1.44 bits on average and 10 bits, log₂ 1024, mean that the model
prefers it to all others. The language is symbols from a Markov chain: the core knows one chain, all devices write
another, and the secret is six symbols that follow a fixed prompt. Training, release and fold are the product's; the
fold of one update is `merge`.
"""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.dictionary_attack import Counts, send, send_noised
from fednested_lib.adapters import attach, detach, merge
from fednested_lib.delta import AdapterSpec, Delta
from fednested_lib.training import deterministic, train_adapters

SYMBOLS, SEQ_LEN, N_ROWS = 48, 24, 64
PROMPT, SECRET_LENGTH, N_CANDIDATES = (1, 2, 3, 4), 6, 1024
RANK, STEPS, CORE_STEPS = 8, 60, 256
OURS = 0.5
A_SEED = "c" * 32


def sentences(n_rows: int, seed: int, *, ours: float) -> np.ndarray:
    """Draw rows [n, SEQ_LEN + 1]; a symbol has four likely successors in the core's chain and four in the devices'.

    A successor comes from the core's chain in 40 % (of the core's text) or 30 % of all cases, from the devices' in
    `ours`, and is any symbol otherwise.
    """
    chains, rng = np.random.default_rng(1).integers(SYMBOLS, size=(2, SYMBOLS, 4)), np.random.default_rng([2, seed])
    rows = rng.integers(SYMBOLS, size=(n_rows, SEQ_LEN + 1), dtype=np.int32)
    theirs = 0.3 if ours else 0.4
    for i in range(1, SEQ_LEN + 1):
        likely = chains[:, rows[:, i - 1], rng.integers(4, size=n_rows)]
        which = rng.random(n_rows)
        rows[:, i] = np.where(which < theirs, likely[0], np.where(which < theirs + ours, likely[1], rows[:, i]))
    return rows


@functools.cache
def core() -> MixtralForCausalLM:
    """Return the frozen model, trained on the core's chain."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=SYMBOLS,
        max_position_embeddings=64,
    )
    model, rows = MixtralForCausalLM(config), torch.from_numpy(sentences(16 * CORE_STEPS, 0, ours=0.0).astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with deterministic():
        for step in range(CORE_STEPS):
            batch = rows[16 * step : 16 * (step + 1)]
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            optimizer.zero_grad()
            cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
    return model.eval()


def secrets(seed: int) -> np.ndarray:
    """Return the candidates of one run [|R|, prompt + secret]; the first is the device's."""
    rng = np.random.default_rng([7, seed])
    tails = rng.integers(SYMBOLS, size=(N_CANDIDATES, SECRET_LENGTH))
    return np.concatenate([np.tile(PROMPT, (N_CANDIDATES, 1)), tails], axis=1).astype(np.int32)


def device_text(seed: int, repeats: int) -> np.ndarray:
    """Return a device's rows; the secret stands at the end of `repeats` of them."""
    rows = sentences(N_ROWS, 2 + seed, ours=OURS)
    secret = secrets(seed)[0]
    rows[:repeats, -len(secret) :] = secret
    return rows


@functools.cache
def learnt(seed: int, repeats: int, mode: str) -> tuple[Delta, Counts]:
    """Train one device; returns the exact delta and the distinct tokens of each expert."""
    model = copy.deepcopy(core())
    spec = AdapterSpec(rank=RANK, alpha=2.0 * RANK, mode=mode, seed=A_SEED if mode == "fixed_a" else None)
    adapters = attach(model, spec, None, seed=seed)
    text = device_text(seed, repeats)
    train_adapters(model, adapters, text, steps=STEPS, batch_size=8, learning_rate=8e-3, seed=seed)
    return copy.deepcopy(adapters.to_delta()), adapters.distinct_tokens


def exposure_plain(seed: int, repeats: int, mode: str = "lora") -> float:
    """Exposure after the fold of an update as the sidecar sends it by default; 0 repeats: of a secret never seen."""
    delta, distinct = learnt(seed, repeats, mode)
    return exposure(send(delta, distinct, floor_per_rank=4), seed)


def exposure_noised(seed: int, repeats: int, *, clip_norm: float, noise_multiplier: float) -> float:
    """Exposure after the fold of one update sent under differential privacy."""
    delta, distinct = learnt(seed, repeats, "fixed_a")
    how = {"clip_norm": clip_norm, "noise_multiplier": noise_multiplier, "sequence": seed}
    sent = send_noised(delta, distinct, **how)
    return exposure(sent, seed)


def folded(delta: Delta) -> MixtralForCausalLM:
    """Return the core plus a delta."""
    model = copy.deepcopy(core())
    detach(model)
    merge(model, delta)
    return model.eval()


def exposure(sent: Delta, seed: int) -> float:
    """Return log₂ |R| − log₂ rank of the device's secret in the core plus a delta; ties count half."""
    rows = torch.from_numpy(secrets(seed).astype(np.int64))
    with deterministic(), torch.inference_mode():
        logits = folded(sent)(input_ids=rows[:, :-1], use_cache=False).logits[:, len(PROMPT) - 1 :]
        nats = cross_entropy(logits.transpose(1, 2).double(), rows[:, len(PROMPT) :], reduction="none").sum(1)
    better, equal = int((nats[1:] < nats[0]).sum()), int((nats[1:] == nats[0]).sum())
    return math.log2(N_CANDIDATES) - math.log2(1 + better + equal / 2)

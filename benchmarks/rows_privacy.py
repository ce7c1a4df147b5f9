"""What leaves and what can be read from it: item 5 of issue 4. `docs/privacy.md` says what the figures mean.

The dictionary attack's value is the worst over attacks, ranks 4, 8 and 16, both layers, every number of distinct
tokens, and three ways of training: one SGD step and ten AdamW steps on rows of one token, where no attention blurs what
the server knows, and AdamW on rows of sixteen. Each point is a mean over devices and experts. The narrow floor is 4·r
distinct tokens per expert, the policy's default; the wide one 8·d, d the hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from benchmarks.canary import exposure_noised, exposure_plain
from benchmarks.dictionary_attack import D_MODEL, Device, Found, attack, send, send_noised, train
from benchmarks.private_learning import PrivateRound
from benchmarks.registry import Reading, figure
from fednested_lib.privacy import epsilon
from tier1.aggregation.fold import one_thread

RANKS = (4, 8, 16)
# Distinct tokens of a device → how many devices are tried; an expert sees half of the tokens, so at 10·r the experts
# are just above the floor.
DISTINCT = {1: 1, 4: 1, 16: 6, 40: 4, 80: 2, 160: 1, 320: 1, 1024: 1}
MANY = (1, 40, 1024, 4096, 4600)  # an expert sees half: at 4096 some are just above the wide floor, at 4600 all
NARROW, WIDE = {"floor_per_rank": 4}, {"floor_per_rank": 4, "floor_per_width": 8}
NOISE_MULTIPLIER, DELTA = 1.0, 1e-5  # ε of one release: 10.0 (replace), 4.4 (zero_out)
CANARY_SEEDS, CANARY_CLIP = 16, 20.0
GAIN_CLIP = 10.0  # above the norm of an update of that world, 8
LEAST_TOKENS = 100  # of a point, where a bound is at stake: below, chance would be read as success


def devices(mode: str, distincts: Mapping[int, int] = DISTINCT) -> Iterator[Device]:
    """Every device that the attack is tried on."""
    for rank in RANKS:
        for distinct, n_devices in distincts.items():
            for seq_len, sgd in ((1, True), (1, False), (16, False)):
                for seed in range(n_devices):
                    yield Device(distinct=distinct, rank=rank, seq_len=seq_len, sgd=sgd, mode=mode, seed=seed)


@functools.cache
def attacked(
    device: Device, floor_per_rank: int = 0, floor_per_width: int | None = None, start_known: bool = False
) -> tuple[Found, ...]:
    """Run the attacks on one device's update as it leaves under floors."""
    trained = train(device)
    sent = send(trained.delta, trained.distinct, floor_per_rank=floor_per_rank, floor_per_width=floor_per_width)
    return tuple(attack(trained, sent, start_known=start_known))


def attacked_noised(device: Device) -> Iterator[Found]:
    """The same under differential privacy and without a floor, over many draws of noise where tokens are few."""
    trained = train(device)
    for draw in range(-(-LEAST_TOKENS // device.distinct)):
        how = {"clip_norm": 1.0, "noise_multiplier": NOISE_MULTIPLIER, "sequence": draw}
        sent = send_noised(trained.delta, trained.distinct, **how)
        yield from attack(trained, sent)


def worst(points: Iterable[tuple[Device, Iterable[Found]]], *, only: str = "", least_tokens: int = 1) -> float:
    """Return the largest share of tokens recovered, in per cent.

    Args:
        points: devices and what the attacks found; those that differ in the seed alone are one point.
        only: one attack.
        least_tokens: that a point must have.
    """
    shares, tokens = defaultdict(list), defaultdict(float)
    for device, found in points:
        for each in found:
            if each.attack.startswith(only):
                key = dataclasses.replace(device, seed=0), each.attack, each.layer
                shares[key].append(each.share)
                tokens[key] += each.distinct
    found_in = [100 * float(np.mean(each)) for key, each in shares.items() if tokens[key] >= least_tokens]
    if not found_in:
        raise RuntimeError("nothing was sent, so nothing was attacked")
    return max(found_in)


@figure("privacy.tokens_recovered_floor_off", unit="%", cls="full")
def tokens_recovered_floor_off() -> float:
    """Training tokens that the server recovers from one update without the floor (the danger), worst case."""
    with one_thread():
        return worst((device, attacked(device)) for device in devices("lora"))


@figure("privacy.tokens_recovered_floor_on", unit="%", bound="<= 5", cls="full")
def tokens_recovered_floor_on() -> float:
    """The same with the policy's wide floor on, 8 hidden sizes per expert: all attacks, at any number of tokens."""
    with one_thread():
        sent = [(device, attacked(device, **WIDE)) for device in devices("lora", dict.fromkeys(MANY, 1))]
        leaks = [device for device, found in sent if found and device.distinct <= 8 * D_MODEL]
        if leaks:
            raise RuntimeError(f"a device with fewer tokens than the floor sent something: {leaks[0]}")
        return worst(sent, least_tokens=LEAST_TOKENS)


@figure("privacy.tokens_recovered_narrow_floor", unit="%", cls="full")
def tokens_recovered_narrow_floor() -> float:
    """The same with the default floor of 4·r alone (a danger, too): the best attack, which reads labels."""
    with one_thread():
        return worst(((device, attacked(device, **NARROW)) for device in devices("lora")), least_tokens=LEAST_TOKENS)


@figure("privacy.tokens_recovered_from_a", unit="%", cls="full")
def tokens_recovered_from_a() -> Reading:
    """The same from A alone, whose start is a secret of the device; the upper end: had the server the start."""
    with one_thread():
        secret, known = (
            worst(
                ((device, attacked(device, **NARROW, start_known=known)) for device in devices("lora")),
                only="starts",
                least_tokens=LEAST_TOKENS,
            )
            for known in (False, True)
        )
    if secret >= known:
        raise RuntimeError(f"a secret start hides nothing: {secret:.0f} % without it, {known:.0f} % with it")
    return Reading(value=secret, low=secret, high=known)


@figure("privacy.tokens_recovered_exact_floor_on", unit="%", bound="<= 5", cls="full")
def tokens_recovered_exact_floor_on() -> float:
    """The same by the row space of B alone, the attack that the floor of 4·r was made against."""
    with one_thread():
        sent = ((device, attacked(device, **NARROW)) for device in devices("lora"))
        return worst(sent, only="rows", least_tokens=LEAST_TOKENS)


@figure("privacy.tokens_recovered_dp", unit="%", bound="<= 5", cls="full")
def tokens_recovered_dp() -> float:
    """The same with differential privacy (noise multiplier 1) and no floor, all attacks, from 1 distinct token up."""
    with one_thread():
        few = (d for d in devices("fixed_a") if d.seq_len == 1 and d.seed == 0 and d.distinct in (1, 16, 80, 320))
        return worst(((device, attacked_noised(device)) for device in few), least_tokens=LEAST_TOKENS)


@figure("privacy.floor_needed", unit="d", cls="full")
def floor_needed() -> float:
    """Distinct tokens per expert, in hidden sizes, from which every attack recovers at most 5 %; rank 16, doubling."""
    with one_thread():
        for distinct in (8192, 4096, 2048, 1024, 512):
            device = Device(distinct=distinct, rank=16)
            share = worst([(device, attacked(device))])
            if share > 5:
                if distinct == 8192:
                    raise RuntimeError(f"{share:.0f} % recovered at {distinct} distinct tokens: no floor in range")
                return distinct / D_MODEL  # an expert sees half of them, and the floor is the next point
        raise RuntimeError("every number of tokens in range is safe: the attack is broken")


@figure("privacy.canary_plain", unit="bit", cls="full")
def canary_plain() -> Reading:
    """Exposure (of 10 bits) of a secret repeated 16 times on one device after the fold, by default: no noise."""
    with one_thread():
        return Reading.of([exposure_plain(seed, 16) for seed in range(CANARY_SEEDS)])


@figure("privacy.canary_dp", unit="bit", bound="<= 1", cls="full")
def canary_dp() -> float:
    """Exposure with differential privacy (z = 1, ε = 10.0 per release at δ = 1e-5) above a secret never seen's."""
    if round(epsilon(NOISE_MULTIPLIER, 1, DELTA), 1) != 10.0:
        raise RuntimeError("the claim names another ε than the accountant")
    with one_thread():
        pairs = [
            exposure_noised(seed, 16, clip_norm=CANARY_CLIP, noise_multiplier=NOISE_MULTIPLIER)
            - exposure_plain(seed, 0, "fixed_a")
            for seed in range(CANARY_SEEDS)
        ]
    return float(np.mean(pairs))


@figure("privacy.devices_for_gain", unit="1", cls="full")
def devices_for_gain() -> float:
    """Devices whose mean update keeps 80 % of one round's gain on held-out real text, noise multiplier 1; doubling."""
    with one_thread(), tempfile.TemporaryDirectory() as scratch:
        private = PrivateRound(Path(scratch), clip_norm=GAIN_CLIP)
        for n_devices in (2**power for power in range(10, 22)):
            if private.gain_kept(noise_multiplier=NOISE_MULTIPLIER, n_devices=n_devices) >= 0.8:
                return n_devices
    raise RuntimeError("not even 2^21 devices keep 80 % of the gain")


@figure("privacy.accountant", unit="1", bound="<= 1e-9", cls="quick")
def accountant() -> float:
    """Largest relative difference of our ε from dp-accounting's, noise multipliers 0.1 to 50, up to 1000 releases."""
    from dp_accounting import get_epsilon_gaussian

    return max(
        abs(
            epsilon(z, releases, delta, adjacency="zero_out") / get_epsilon_gaussian(z / math.sqrt(releases), delta) - 1
        )
        for z in (0.1, 0.3, 1.0, 3.0, 10.0, 50.0)
        for releases in (1, 10, 100, 1000)
        for delta in (1e-3, 1e-5, 1e-9)
    )

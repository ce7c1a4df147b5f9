"""What an update costs on the wire and what the federation learns all the same. Item 3 of issue 4.

A federation of speakers of Shakespeare's plays (`world.py`: real text, real local training, real wire, fold and gate):
five rounds, each device two updates per version, adapters of rank 8 on 8 experts per layer. Every variant is run from
the same first version with the same settings; its bytes are those of the payloads, of fp32 factors of all experts, and
its gain is the fall of the devices' mean held-out loss over the five rounds, of that of fp32 factors of all experts.
A value is the worst of the seeds, low and high are the least and the most of them; how many columns and levels are
chosen was found on seeds 0, 1, 2, 6, 7 and 8. Tier 1 balances its experts, so the text of a device needs them all:
which columns leave is chosen over all experts (`mean_rank`), and an expert that hardly moved sends few or none.
Aggregation is that of an empty `aggregation:`, without the bounds and the probe of a new workspace: they sort out
hostile devices, and here are none.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import structlog

from benchmarks.registry import Reading, figure
from benchmarks.world import Run, Sizes, World
from fednested_lib.adapter_spec import INT4_LEVELS
from fednested_lib.config import OutgoingConfig
from fednested_lib.delta import Delta

SEEDS = (3, 4, 5)
ROUNDS, UPDATES_PER_BASE = 5, 2
SIZES = Sizes(n_devices=4, rank=8, local_steps=10, suite_tokens=512)
MEAN_RANK = 3.0  # of 8
LEVELS = 3  # of 7


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How updates leave, and whether devices choose the columns that do."""

    encoding: str
    chosen: bool = False
    feedback: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """Mean bytes of a payload, and the fall of the held-out loss in nats per token."""

    payload_bytes: float
    gain: float


FULL = Variant(encoding="fp32")
VARIANTS = [
    Variant(encoding=encoding, chosen=chosen, feedback=feedback)
    for encoding, chosen in (("int8", False), ("int4", False), ("int4", True))
    for feedback in (False, True)
]


def federate(world: World, variant: Variant) -> tuple[Result, Delta]:
    """Run five rounds; returns what they cost and gave, and one delta as it was trained."""
    # Devices are honest here: without probe and relative bounds, which sort out others, runs differ by the wire alone.
    run = Run(world, f"{variant.encoding}-{variant.chosen}-{variant.feedback}", aggregation={})
    outgoing = OutgoingConfig(
        encoding=variant.encoding,
        levels=LEVELS if variant.chosen else INT4_LEVELS,
        mean_rank=MEAN_RANK if variant.chosen else None,
        error_feedback=variant.feedback,
    )
    sizes = []
    for number in range(ROUNDS):
        for client in world.clients:
            carried = None
            for sequence in range(number * UPDATES_PER_BASE, (number + 1) * UPDATES_PER_BASE):
                trained = run.honest(client, sequence)
                made = run.made(client, sequence, trained, outgoing, carried)
                carried = made.residual
                sizes.append(len(made.payload))
                run.append(client, made.envelope.to_bytes(), made.payload)
        run.turn()
    if any(settled.status != "head" for settled in run.settled):
        raise RuntimeError(f"a version of {variant} did not pass the gate: {[each.status for each in run.settled]}")
    gain = run.loss(world.clients, after=0) - run.loss(world.clients)
    return Result(payload_bytes=float(np.mean(sizes)), gain=gain), trained.delta


@cache
def shares(seeds: tuple[int, ...] = SEEDS) -> Mapping[Variant, list[tuple[float, float]]]:
    """Return variant → per seed (bytes, gain) in % of fp32 factors of all experts."""
    before, found = structlog.get_config(), {variant: [] for variant in VARIANTS}
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as directory:
                world = World(Path(directory), seed, SIZES)
                full, delta = federate(world, FULL)
                if full.gain <= 0.1:
                    raise RuntimeError(f"fp32 adapters gain {full.gain:.3f} nats with seed {seed}: nothing to keep")
                for variant in VARIANTS:
                    result, _ = federate(world, variant)
                    bytes_share = 100 * result.payload_bytes / delta.size_fp32_bytes
                    found[variant].append((bytes_share, 100 * result.gain / full.gain))
    finally:
        structlog.configure(**before)
    return found


def _bytes(encoding: str, *, chosen: bool = False) -> Reading:
    """Return the most bytes, with and without feedback."""
    found = [
        share
        for feedback in (False, True)
        for share, _ in shares()[Variant(encoding=encoding, chosen=chosen, feedback=feedback)]
    ]
    return Reading(value=max(found), low=min(found), high=max(found))


def _gain(encoding: str, *, chosen: bool = False, feedback: bool) -> Reading:
    found = [gain for _, gain in shares()[Variant(encoding=encoding, chosen=chosen, feedback=feedback)]]
    return Reading(value=min(found), low=min(found), high=max(found))


@figure("update.bytes_int8", unit="%", bound="<= 27", cls="full")
def bytes_int8() -> Reading:
    """Payload of a device update in int8, of the fp32 factors of all experts; the most of three seeds."""
    return _bytes("int8")


@figure("update.bytes_int4", unit="%", bound="<= 14", cls="full")
def bytes_int4() -> Reading:
    """The same in int4."""
    return _bytes("int4")


@figure("update.bytes_chosen", unit="%", bound="<= 3.5", cls="full")
def bytes_chosen() -> Reading:
    """The same in int4 with 3 of 7 levels: the columns that matter most of all 8 experts, 3 of 8 on average."""
    return _bytes("int4", chosen=True)


@figure("update.gain_int8", unit="%", bound=">= 95", cls="full")
def gain_int8() -> Reading:
    """Held-out gain of 5 rounds with int8 updates, of that with fp32 factors of all experts; the least of 3 seeds."""
    return _gain("int8", feedback=False)


@figure("update.gain_int8_feedback", unit="%", bound=">= 95", cls="full")
def gain_int8_feedback() -> Reading:
    """The same with error feedback."""
    return _gain("int8", feedback=True)


@figure("update.gain_int4", unit="%", bound=">= 95", cls="full")
def gain_int4() -> Reading:
    """The same in int4."""
    return _gain("int4", feedback=False)


@figure("update.gain_int4_feedback", unit="%", bound=">= 95", cls="full")
def gain_int4_feedback() -> Reading:
    """The same in int4 with error feedback."""
    return _gain("int4", feedback=True)


@figure("update.gain_chosen", unit="%", bound=">= 95", cls="full")
def gain_chosen() -> Reading:
    """The same in int4 with 3 of 7 levels, of chosen columns."""
    return _gain("int4", chosen=True, feedback=False)


@figure("update.gain_chosen_feedback", unit="%", bound=">= 95", cls="full")
def gain_chosen_feedback() -> Reading:
    """The same in int4 with 3 of 7 levels, of chosen columns, with error feedback."""
    return _gain("int4", chosen=True, feedback=True)

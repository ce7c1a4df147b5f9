"""The way out: hostile and honest spool files, canaries, what a lying trainer can still say. Item 4 of issue 4.

A hostile class is right when the rule that it names refuses every file of it, the audit log names the same rule and
nothing new is in the outbox; one that is not refused must leave nothing of what it smuggles.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from benchmarks.byte_canaries import findings
from benchmarks.hostile_spool import CLASSES
from benchmarks.lying_trainer import capacity_bits, lsb_agreement
from benchmarks.registry import Reading, figure
from benchmarks.sidecar_scene import LAYERS, RULES, SEQUENCE, Scene, make_base, make_delta
from fednested_lib.audit import verify_audit
from fednested_lib.delta import ENCODINGS
from fednested_lib.envelope import parse_envelope
from fednested_lib.errors import AuditError, PayloadError
from fednested_lib.sidecar import check_declaration, make_update, norm
from fednested_lib.snapshot import expert_shapes
from tests.audit_tampering import EDITS, tampered, write_log
from tests.policies import make_policy
from tier1.aggregation.fold import one_thread

PER_CLASS = 12
HONEST, PER_SCENE = 10_000, 100
LARGE = {"num_local_experts": 8, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8}
REPEATS = 9
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # ten durable writes an update would be the whole time


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What happened to one hostile file."""

    name: str
    digest: str
    expected: str | None
    found: str | None
    recorded: str | None
    escaped: bool

    @property
    def right(self) -> bool:
        """Refused by the right rule, on record, with nothing let out; or let out without what it smuggled."""
        return not self.escaped and self.found == self.expected == self.recorded


@contextmanager
def quiet_scene(**options) -> Iterator[Scene]:
    """Yield a scene in a temporary directory; its log lines are not printed."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
            scene = Scene(Path(directory) / "device", **options)
            try:
                yield scene
            finally:
                scene.close()
    finally:
        structlog.configure(**before)


@functools.cache
def hostile_trials(per_class: int = PER_CLASS, seed: int = 20261122) -> tuple[Trial, ...]:
    """Try every class of hostile files."""
    rng, trials = random.Random(seed), []
    with quiet_scene() as scene:
        scene.draft(make_delta(scene.base), rng).write(scene.spool.directory)
        scene.release()  # an honest one first: it fixes the experts
        for name, (rule, change) in CLASSES.items():
            for _ in range(per_class):
                if rule is not None:
                    trials.append(_try(scene, name, rule, change, rng))
                    continue
                with quiet_scene() as fresh:
                    trials.append(_try(fresh, name, rule, change, rng))
    return tuple(trials)


def _try(scene: Scene, name: str, rule: str | None, change, rng: random.Random) -> Trial:
    scene.clear()
    delta = make_delta(scene.base, seed=rng.randrange(1 << 30))
    each = scene.draft(delta, rng, secret=f"SECRET-{rng.getrandbits(64):016x}")
    change(each, rng)
    digest, before, found = each.write(scene.spool.directory), len(scene.sent()), None
    try:
        scene.release()
    except PayloadError as error:
        found = error.reason
    lines = scene.audit.path.read_bytes().splitlines()
    sent = scene.sent()
    escaped = len(sent) != before if rule is not None else not _neutral(scene, each)
    escaped |= any(each.secret.encode() in part for parts in sent for part in parts)
    recorded = json.loads(lines[-1]).get("rule")
    return Trial(name=name, digest=digest, expected=rule, found=found, recorded=recorded, escaped=escaped)


def _neutral(scene: Scene, each) -> bool:
    """Check that what left is within the norm, without the withheld experts, and not one number as it was spooled."""
    ((envelope, payload),) = scene.sent()
    arrived = scene.arrived(parsed := parse_envelope(envelope), payload)
    floor, distinct = 16, each.document["distinct_tokens"]
    smuggled = sum(
        np.count_nonzero((sent == spooled) & (spooled != 0))
        for name, factors in arrived.factors.items()
        for sent, spooled in ((getattr(factors, f), each.tensors[f"{name}.{f}"]) for f in ("lora_a", "lora_b"))
    )
    total = sum(values.size for values in each.tensors.values())
    withheld = all(
        (n >= floor) == (told > 0) == bool(factors.lora_b[i].any())
        for name, factors in arrived.factors.items()
        for layer in [name.split(".")[2]]
        for i, (n, told) in enumerate(zip(distinct[layer], parsed.tokens[layer], strict=True))
    )
    return smuggled <= 0.1 * total and withheld and norm(arrived) <= RULES["max_norm"] * 1.05


@figure("sidecar.hostile_files", unit="1", bound=">= 500", cls="full")
def hostile_files() -> float:
    """Distinct hostile spool files tried, of 74 classes."""
    return len({trial.digest for trial in hostile_trials()})


@figure("sidecar.hostile_refused", unit="%", bound="== 100", cls="full")
def hostile_refused() -> float:
    """Of them: refused by exactly the rule of their class, on record, or clipped, withheld, rounded away by it."""
    trials = hostile_trials()
    return 100 * sum(trial.right for trial in trials) / len(trials)


@figure("sidecar.escapes", unit="1", bound="== 0", cls="full")
def escapes() -> float:
    """Of them: files that left the device, or whose text occurs in what did."""
    return sum(trial.escaped for trial in hostile_trials())


@figure("sidecar.honest_passed", unit="1", bound="== 10000", cls="full")
def honest_passed() -> float:
    """Honest files of 10,000 (modes, ranks, experts, encodings) that leave as trained, to a rounding step."""
    return honest(HONEST)


def honest(n: int, seed: int = 4, per_scene: int = PER_SCENE) -> int:
    """Release n honest updates and return how many arrive within one rounding step of what was trained.

    Every scene has its own encoding, mode, rank and experts; one in five is of mode `fixed_a`, whose A takes long.
    """
    rng, passed = random.Random(seed), 0
    for scene_number in range(n // per_scene):
        encoding = ENCODINGS[scene_number % len(ENCODINGS)]
        kind = {"mode": "fixed_a" if scene_number % 5 == 4 else "lora", "rank": rng.choice([2, 4])}
        layers = {layer: tuple(sorted(rng.sample(LAYERS[layer], rng.randint(1, 4)))) for layer in LAYERS}
        with quiet_scene(encoding=encoding) as scene:
            for sequence in range(per_scene):
                size = 10 ** rng.uniform(-6, -1.5)
                delta = make_delta(scene.base, layers=layers, seed=rng.randrange(1 << 30), size=size, **kind)
                counts = {int(layer): [rng.randint(64, 9999) for _ in ids] for layer, ids in layers.items()}
                scene.spool.write(
                    delta,
                    sequence=sequence,
                    base_version=scene.base.version,
                    base_digest=scene.base.digest,
                    routed_tokens=counts,
                    distinct_tokens=counts,
                    num_examples=rng.randint(1, 999),
                )
                passed += _arrives(scene, delta, sequence)
                scene.spool.remove(sequence)
    return passed


def _arrives(scene: Scene, delta, sequence: int) -> bool:
    try:
        envelope = scene.release(sequence, now=1e9 + sequence)
    except PayloadError:
        return False
    item = scene.outbox.pending()[-1]
    arrived = scene.arrived(envelope, scene.outbox.payload(item))
    scene.outbox.confirm([item.update_id])
    step = {"fp32": 0.0, "fp16": 1e-3, "int8": 1 / 127, "int4": 1 / 7}[envelope.encoding]
    least = 1e-7 if envelope.encoding == "fp16" else 0.0  # what half precision has below its normal numbers
    pairs = [
        (getattr(each, factor), getattr(arrived.factors[name], factor))
        for name, each in delta.factors.items()
        for factor in ("lora_a", "lora_b")
    ]
    return all(np.abs(left - came).max() <= 1.01 * step * np.abs(left).max() + least for left, came in pairs)


@contextmanager
def _large() -> Iterator[tuple[Scene, float]]:
    """Yield a scene with an update of about 10 MB of fp32 factors in its spool, and its megabytes."""
    base = make_base(LARGE)
    layers = {layer: tuple(range(LARGE["num_local_experts"])) for layer in range(LARGE["num_hidden_layers"])}
    policy = make_policy(**{**RULES, "experts": "all"})
    with one_thread(), quiet_scene(base=base, policy=policy) as scene:
        delta = make_delta(base, layers=layers, rank=16, size=0.01)
        counts = {layer: [500] * len(ids) for layer, ids in layers.items()}
        scene.spool.write(
            delta,
            sequence=SEQUENCE,
            base_version=base.version,
            base_digest=base.digest,
            routed_tokens=counts,
            distinct_tokens=counts,
            num_examples=100,
        )
        yield scene, delta.size_fp32_bytes / 1e6


def _parse(scene: Scene):
    declaration = scene.spool.declaration(SEQUENCE)
    check_declaration(declaration, scene.base, scene.sidecar.policy)
    delta = scene.spool.delta(declaration, expert_shapes(scene.base))
    norm(delta)
    return declaration, delta


def _per_10_mb(megabytes: float, run) -> Reading:
    run()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return Reading.of([1e3 * each * 10 / megabytes for each in seconds])


@figure("sidecar.time", unit="ms", bound="<= 50", cls="full")
def decision_time() -> Reading:
    """Time from a spooled file to the decision about it, per 10 MB: read, hash, strict parse, policy, norm."""
    with _large() as (scene, megabytes):
        return _per_10_mb(megabytes, lambda: _parse(scene))


@figure("sidecar.remake_time", unit="ms", cls="full")
def remake_time() -> Reading:
    """Time to make the outgoing update after it, per 10 MB: floor, clip, int8, zstd, envelope, signature."""
    with _large() as (scene, megabytes):
        declaration, delta = _parse(scene)
        first = make_update(declaration, delta, policy=scene.sidecar.policy, encoding="int8", **scene.sidecar.identity)
        again = make_update(declaration, delta, policy=scene.sidecar.policy, encoding="int8", **scene.sidecar.identity)
        if (first.envelope, first.payload) != (again.envelope, again.payload):
            raise RuntimeError("the same update is not made of the same bytes")

        def remake() -> None:
            make_update(declaration, delta, policy=scene.sidecar.policy, encoding="int8", **scene.sidecar.identity)

        return _per_10_mb(megabytes, remake)


@figure("sidecar.canaries", unit="1", bound="== 0", cls="full")
def canaries() -> float:
    """Canaries of rows, file names, environment, user, host, comments, spool found in what left, unpacked."""
    return len(findings())


@figure("sidecar.lsb", unit="1", bound="<= 0.05", cls="full")
def lsb() -> float:
    """Distance from ½ of the share of 2²¹ bits, hidden in mantissas' lowest bits, that is read after int8."""
    return abs(lsb_agreement(1 << 21) - 0.5)


@figure("sidecar.capacity", unit="bit", cls="full")
def capacity() -> float:
    """Bits per value at most for a lying trainer, int8: codes, scales, counts; rank 8, 8 experts of 512×512."""
    found = capacity_bits()
    return found.total / found.values


@figure("sidecar.capacity_dp", unit="bit", cls="full")
def capacity_dp() -> float:
    """Bits per update at most for a lying trainer with differential privacy, z = 1, telemetry noised."""
    return capacity_bits(noise_multiplier=1.0).total


def detected(repeats: int, seed: int = 6) -> float:
    """Return the share of random tamperings, `repeats` of each kind, that verification finds, in percent."""
    rng, found = random.Random(seed), 0
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        whole = Path(place) / "whole"
        write_log(whole, 40)
        verify_audit(whole / "audit", anchor=whole / "anchor")
        for edit in EDITS:
            for _ in range(repeats):
                copy = Path(place) / "copy"
                shutil.copytree(whole, copy)
                tampered(copy, edit, rng)
                try:
                    verify_audit(copy / "audit", anchor=copy / "anchor")
                except AuditError:
                    found += 1
                shutil.rmtree(copy)
    return 100 * found / (repeats * len(EDITS))


@figure("audit.tampering_detected", unit="%", bound="== 100", cls="full")
def tampering_detected() -> float:
    """Random edits, deletions, swaps, forgeries and truncations of an audit log, of 1,600, that verification finds."""
    return detected(100)


@figure("audit.append_time", unit="ms", cls="full")
def append_time() -> Reading:
    """Time to put one decision into the audit log, three fsyncs included."""
    with tempfile.TemporaryDirectory() as place:
        times = []
        for first in range(20):
            began = time.perf_counter()
            write_log(Path(place), 5, first=5 * first)
            times.append(1e3 * (time.perf_counter() - began) / 5)
    return Reading.of(times)

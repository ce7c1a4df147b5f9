"""The device's claims: a step beside peft's, and experts held in four bits. Items 1 and 2 of issue 4.

Outputs and gradients are compared before anything is timed. Both sides take their steps in turn, in this process, on
one thread; the time is that of the processor, and a figure is the ratio of the lower quartiles of at least five.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles

import structlog
from torch import Tensor

from benchmarks.device_step import FEW, MANY, SPEC, VOCABULARY, gradients, make_model, make_text, ours, peft_of, stepper
from benchmarks.registry import Reading, figure
from benchmarks.results import ROOT
from fednested_lib.adapters import attach, merge
from fednested_lib.blobs import BlobStore
from fednested_lib.delta import AdapterSpec
from fednested_lib.frozen import FrozenWeight, quantise_experts
from fednested_lib.memory import estimate
from fednested_lib.snapshot import SnapshotManifest, build_model, describe_config, write_state_dict
from fednested_lib.text import load_tokenizer, pack, read_texts
from fednested_lib.training import mean_loss, train_adapters
from tests.peft_oracle import factors_of
from tier1.aggregation.fold import one_thread

REPEATS = 7
TOLERANCE = 1e-5


def ratio(left: Callable[[], None], right: Callable[[], None]) -> Reading:
    """Time both in turn and return left / right, with the range of the pairs."""
    left(), right()
    pairs = [(_seconds(left), _seconds(right)) for _ in range(REPEATS)]
    value = _lower_quartile([pair[0] for pair in pairs]) / _lower_quartile([pair[1] for pair in pairs])
    every = [value, *(before / after for before, after in pairs)]
    return Reading(value=value, low=min(every), high=max(every))


def _seconds(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def _lower_quartile(values: list[float]) -> float:
    return quantiles(values, n=4, method="inclusive")[0]


def _check_equal(found: Tensor, expected: Tensor, what: str) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{what} differ by {difference:.1e} of their largest value, at most {TOLERANCE:.0e} is equal"
        )


def over_peft(shape: dict[str, int], n_tokens: int) -> Reading:
    """Compare a step with peft's, then time both."""
    with one_thread():
        (model, adapters), text = ours(shape), make_text(n_tokens)
        twin, trained = peft_of(shape, adapters)
        _check_equal(gradients(model, text), gradients(twin.model, text), "logits")
        for name, factors in factors_of(adapters).items():
            for mine, theirs in zip(factors, twin.gradients(name), strict=True):
                _check_equal(mine.grad[:, : adapters.spec.rank], theirs, f"gradients of {name}")
        return ratio(stepper(twin.model, trained, text), stepper(model, adapters.parameters(), text))


@figure("device.step_64_experts_64_tokens", unit="x", bound=">= 8", cls="full")
def step_64_experts_64_tokens() -> Reading:
    """Speed of a training step over peft 0.21 `target_parameters`: 64 experts of 512×512, top 4, 64 tokens."""
    return over_peft(MANY, 64)


@figure("device.step_64_experts_256_tokens", unit="x", bound=">= 5", cls="full")
def step_64_experts_256_tokens() -> Reading:
    """The same with 256 tokens."""
    return over_peft(MANY, 256)


@figure("device.step_8_experts_1024_tokens", unit="x", bound=">= 1.1", cls="full")
def step_8_experts_1024_tokens() -> Reading:
    """Speed of a training step over peft's where peft is at its best: 8 experts of 256×512, top 2, 1024 tokens."""
    return over_peft(FEW, 1024)


@figure("device.frozen_share", unit="%", cls="full")
def frozen_share() -> Reading:
    """Time of forward and backward of the bare model (transformers' own, to its inputs), of a step's at 256 tokens."""
    with one_thread():
        (model, adapters), frozen, text = ours(MANY), make_model(MANY), make_text(256)

        def frozen_pass() -> None:
            inputs = frozen.get_input_embeddings()(text).requires_grad_()
            frozen(inputs_embeds=inputs, use_cache=False).logits.mean().backward()

        found = ratio(frozen_pass, stepper(model, adapters.parameters(), text))
    return Reading(value=100 * found.value, low=100 * found.low, high=100 * found.high)


@figure("device.step_memory", unit="%", bound="<= 25", cls="full")
def step_memory() -> float:
    """Peak memory of a step above the loaded model, of peft's, at 64 experts; the worse of 64 and 256 tokens."""
    return max(100 * peak_bytes("fp32", n_tokens) / peak_bytes("peft", n_tokens) for n_tokens in (64, 256))


@figure("device.memory_estimate", unit="x", bound="<= 1.5", cls="full")
def memory_estimate() -> Reading:
    """Estimate that `training.memory_limit_mb` goes by, of the measured peak of a step; 64 to 1024 tokens, int4 too."""
    found = []
    for kind, n_tokens in (("fp32", 64), ("fp32", 1024), ("int4", 256)):
        manifest = SnapshotManifest(
            version=0, family="mixtral", model_config=describe_config(make_model(MANY).config), tokenizer="", blobs={}
        )
        n_adapted = dict.fromkeys(range(4), MANY["num_local_experts"])
        need = estimate(manifest, frozen=kind, rank=SPEC.rank, n_adapted=n_adapted, tokens=n_tokens, process_bytes=0)
        # The factors and the table of tokens are there before the step that is measured.
        table = sum(n_adapted.values()) * VOCABULARY
        found.append((need.step + (need.adapters - table) * 4 // 5) / peak_bytes(kind, n_tokens))
    if min(found) < 1:
        raise RuntimeError(f"a step takes {1 / min(found):.2f} times its estimate: it would not have been refused")
    return Reading(value=max(found), low=min(found), high=max(found))


def peak_bytes(kind: str, n_tokens: int) -> int:
    """Return what two steps take above the loaded model, in a fresh process."""
    return _printed_by("benchmarks.device_step", kind, str(n_tokens))


def _printed_by(module: str, *arguments: str) -> int:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return int(done.stdout.splitlines()[-1])


@figure("device.int4_memory", unit="x", bound=">= 6.5", cls="full")
def int4_memory() -> float:
    """Resident bytes of 64 fp32 experts of 512×512 in four layers, over those of the same experts in int4."""
    model = make_model(MANY)
    full = sum(each.nbytes for name, each in model.named_parameters() if ".experts." in name)
    quantise_experts(model, "int4")
    if any(".experts." in name for name, _ in model.named_parameters()):
        raise RuntimeError("experts in fp32 are left")
    held = [buffer for module in model.modules() if isinstance(module, FrozenWeight) for buffer in module.buffers()]
    return full / sum(buffer.untyped_storage().nbytes() for buffer in held)


@figure("device.int4_load", unit="%", bound="<= 25", cls="full")
def int4_load() -> float:
    """Peak memory of loading a snapshot with int4 experts, above imports, of what its experts take in fp32."""
    with tempfile.TemporaryDirectory() as directory:
        model, store = make_model(MANY), BlobStore(directory)
        full = sum(each.nbytes for name, each in model.named_parameters() if ".experts." in name)
        manifest = SnapshotManifest(
            version=0,
            family="mixtral",
            model_config=describe_config(model.config),
            tokenizer="0" * 64,
            blobs=write_state_dict(model.state_dict(), "mixtral", store),
        )
        return 100 * _printed_by("benchmarks.device_load", directory, store.put(manifest.to_json()), "int4") / full


@figure("device.int4_step", unit="x", bound="<= 1.6", cls="full")
def int4_step() -> Reading:
    """Time of a step on int4 experts over one on fp32 experts, the worst of 64 and 8 experts, 256 and 1024 tokens."""
    found = [_over_fp32("int4", shape, n) for shape in (MANY, FEW) for n in (256, 1024)]
    return max(found, key=lambda reading: reading.value)


@figure("device.int8_step", unit="x", cls="full")
def int8_step() -> Reading:
    """The same for int8, 64 experts and 256 tokens."""
    return _over_fp32("int8", MANY, 256)


def _over_fp32(form: str, shape: dict[str, int], n_tokens: int) -> Reading:
    with one_thread():
        text, (held, on_held), (full, on_full) = make_text(n_tokens), ours(shape, form), ours(shape)
        return ratio(stepper(held, on_held.parameters(), text), stepper(full, on_full.parameters(), text))


@figure("device.int4_gain", unit="%", bound=">= 95", cls="full")
def int4_gain() -> Reading:
    """Held-out gain of adapters trained on int4 experts and merged into the fp32 masters, of that of fp32 adapters."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        with tempfile.TemporaryDirectory() as directory:
            return _gain(Path(directory))
    finally:
        structlog.configure(**before)


def _gain(directory: Path, steps: int = 40, n_devices: int = 5) -> Reading:
    """Train a first version on plays, then adapters of each speaker on his own lines, both ways, and judge them."""
    from benchmarks.world import Run, Sizes, World

    world = World(directory, 0, Sizes(n_devices=n_devices))
    run, sizes = Run(world, "gain"), world.sizes
    snapshot, blobs = run.champion.snapshot, run.fed.blobs
    tokenizer = load_tokenizer(blobs.get(snapshot.tokenizer))
    shares, gains = [], {"fp32": 0.0, "int4": 0.0}
    for client in world.clients:
        texts = read_texts(world.judges[client])[0]
        judge = pack(texts, tokenizer, sizes.seq_len, source=world.judges[client], key="sizes.seq_len")
        base = mean_loss(build_model(snapshot, blobs), judge)[0]
        mine = {}
        for frozen in gains:
            model = build_model(snapshot, blobs, experts="fednested_lora", frozen=frozen)
            adapters = attach(model, AdapterSpec(rank=sizes.rank, alpha=2.0 * sizes.rank), None, seed=1)
            rows = world.rows_of(run.fed, snapshot, client)
            train_adapters(
                model, adapters, rows, steps=steps, batch_size=sizes.batch, learning_rate=sizes.local_rate, seed=1
            )
            merged = build_model(snapshot, blobs)
            merge(merged, adapters.to_delta())
            mine[frozen] = base - mean_loss(merged, judge)[0]
            gains[frozen] += mine[frozen]
        if mine["fp32"] <= 0.05:
            raise RuntimeError(f"the adapter of {client} gains {mine['fp32']:.3f} nats: nothing to keep")
        shares.append(100 * mine["int4"] / mine["fp32"])
    value = 100 * gains["int4"] / gains["fp32"]
    return Reading(value=value, low=min(shares), high=max(shares))

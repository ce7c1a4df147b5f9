"""What a training takes in memory, before it takes it: a trainer with a bound says what it needs instead of dying.

    need = process + model + adapters + max(loading, step)

`process` is what is resident before the model is loaded: the libraries. `model` is the core in fp32 and the experts as
they are held. `adapters` is their factors five times (gradient, two moments of AdamW, its scratch) and the table of
tokens seen. `loading` is the core shard that is being read, twice. `step` is what a micro-batch keeps for the backward
pass, per layer 16·N·D of norms and attention and 2·S·F of the experts, the working set of one layer, S·(4·D + 8·F), and
the logits, 4·N·V, and a tenth more for what the allocator cannot give back. It errs on the high side;
`device.memory_estimate` of the figures holds it to the measured peak.

N tokens of a micro-batch, S = N·top-k routed rows, D model, F hidden size of an expert, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fednested_lib.errors import ConfigError
from fednested_lib.partition import expert_param, group_of
from fednested_lib.snapshot import Frozen, SnapshotManifest, expert_shapes

_FP32 = 4
# Bytes per weight; a scale per 64 inputs of int4 at the least, per row of 64 or more of int8.
_HELD = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / 64, "int4": 0.5 + 4 / 64}
_MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of each part."""

    process: int
    model: int
    adapters: int
    loading: int
    step: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.process + self.model + self.adapters + max(self.loading, self.step)


def resident_bytes() -> int:
    """Return the resident set of this process now; where the system does not say, its high-water mark."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def estimate(
    manifest: SnapshotManifest,
    *,
    frozen: Frozen,
    rank: int,
    n_adapted: Mapping[int, int],
    tokens: int,
    process_bytes: int,
) -> Need:
    """Estimate what training on a snapshot takes.

    Args:
        manifest: of the snapshot; nothing of it is read but the model config.
        frozen: how the experts are held.
        rank: of the adapters.
        n_adapted: adapted experts per layer.
        tokens: of one micro-batch.
        process_bytes: resident before the model is loaded.
    """
    config, shapes = manifest.model_config, expert_shapes(manifest)
    core, rest = _core_bytes(manifest)
    experts = sum(n * d_out * d_in for n, d_out, d_in in shapes.values())
    factors = sum(
        n_adapted.get(expert_param(name)[0], 0) * (-(-rank // 4) * 4) * (d_out + d_in) * _FP32
        for name, (_, d_out, d_in) in shapes.items()
    )
    hidden, vocabulary, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    width = max(shape[2] for name, shape in shapes.items() if expert_param(name)[1] == "down_proj")
    rows = tokens * config["num_experts_per_tok"]
    kept = layers * (16 * tokens * hidden + 2 * rows * width)
    working = rows * (4 * hidden + 8 * width) + 4 * tokens * vocabulary
    scratch = 0 if frozen == "fp32" else max(d_out * d_in for _, d_out, d_in in shapes.values())
    return Need(
        process=process_bytes,
        model=core + int(experts * _HELD[frozen]),
        adapters=5 * factors + sum(n_adapted.values()) * vocabulary,
        loading=2 * rest,
        step=_FP32 * (kept + working + scratch) * 11 // 10,
    )


def _core_bytes(manifest: SnapshotManifest) -> tuple[int, int]:
    """Return the bytes of everything but the experts, and of what of it is in no layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**manifest.model_config), dtype=torch.float32)
    sizes = {name: each.numel() * _FP32 for name, each in model.named_parameters()}
    core = {name: size for name, size in sizes.items() if group_of(name, manifest.family) != "experts"}
    return sum(core.values()), sum(size for name, size in core.items() if ".layers." not in name)


def require(need: Need, limit_mb: int, *, micro_batch_size: int, frozen: Frozen) -> None:
    """Refuse what does not fit.

    Raises:
        ConfigError: names the need, its parts, the bound and what to change.
    """
    if need.total <= limit_mb * _MB:
        return
    parts = {name: getattr(need, name) for name in ("process", "model", "adapters", "step")}
    smaller = f"training.micro_batch_size (now {micro_batch_size}), adapters.budget or adapters.rank" + (
        "" if frozen == "int4" else f", or model.frozen (now {frozen}) to int4"
    )
    raise ConfigError(
        f"training.memory_limit_mb = {limit_mb}, training on this model takes about {-(-need.total // _MB)} ("
        + ", ".join(f"{name} {-(-size // _MB)}" for name, size in parts.items())
        + f"): lower {smaller}, or raise the limit"
    )

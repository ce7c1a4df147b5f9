"""A delta as a directory that Hugging Face peft opens, and back, without peft.

    W_e ← W_e + (lora_alpha/r) · B_e·A_e        the same scale and factors as ours, so nothing is computed, only moved

peft (0.21) puts LoRA on fused experts through `target_parameters`: one module per parameter, that of `gate_up_proj`
inside that of `down_proj`, and per module two matrices for all E experts of a layer:

    lora_A.weight [E·r, d_in]    expert-major                A_e = lora_A.reshape(E, r, d_in)[e]
    lora_B.weight [d_out, r·E]   rank-major, expert-minor    B_e = lora_B.reshape(d_out, r, E)[:, :, e]

peft knows no subset of experts: those that a delta does not have are written as zeros, and an expert that is all zeros
in both projections of a layer is none when read. A directory holds no counts of tokens, so it can be looked at, merged
and evaluated but not sent: what may leave a device is judged by these counts (`sidecar.py`).

Reading is strict: exact names, shapes and fp32, one rank, no option that would change the formula, and no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fednested_lib.blobs import write_durable
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors
from fednested_lib.errors import PayloadError
from fednested_lib.partition import PROJECTIONS, expert_name, expert_param

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_HEADER_BYTES = 64 * 1024  # of a safetensors file, above 512 bytes per tensor
_TARGETS = [f"mlp.experts.{projection}" for projection in PROJECTIONS]
# Keys of adapter_config.json that say nothing about what a trained adapter computes; of all others only the ones below
# may be set. Dropout is off when a model is not trained.
_SAYS_NOTHING = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
    "lora_dropout", "megatron_core", "qalora_group_size",
}  # fmt: skip
_MEANT = {"peft_type", "r", "lora_alpha", "target_parameters", "bias", "init_lora_weights"}


def write_peft(delta: Delta, directory: Path, shapes: Mapping[str, tuple[int, int, int]]) -> None:
    """Write a delta as a peft adapter, the configuration last.

    Args:
        delta: any subset of experts.
        directory: created; files of an earlier call are replaced.
        shapes: (experts, d_out, d_in) of every fused expert parameter of the base model.

    Raises:
        PayloadError: reason ``bad_adapter``: factors that do not fit the model.
        StorageError: the disk is full or the directory cannot be written.
    """
    from safetensors.numpy import save

    unknown = sorted(set(delta.factors) - set(shapes))
    if unknown:
        raise PayloadError("bad_adapter", f"the model has no {unknown[0][:120]}: name the snapshot of the delta's base")
    tensors = {}
    for name, shape in shapes.items():
        lora_a, lora_b = _all_experts(name, delta.factors.get(name), delta.spec.rank, shape)
        key_a, key_b = _keys(name)
        tensors[key_a] = lora_a.reshape(-1, shape[2])
        tensors[key_b] = np.ascontiguousarray(lora_b.transpose(1, 2, 0)).reshape(shape[1], -1)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": delta.spec.rank,
        "lora_alpha": delta.spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [],
        "target_parameters": _TARGETS,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "base_model_name_or_path": None,
    }
    write_durable(directory / TENSORS, save(tensors, metadata={"format": "pt"}))
    write_durable(directory / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def _keys(name: str) -> tuple[str, str]:
    layer, projection = expert_param(name)
    inner = "base_layer." if projection == PROJECTIONS[0] else ""
    prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{inner}"
    return f"{prefix}lora_A.weight", f"{prefix}lora_B.weight"


def _all_experts(
    name: str, factors: ExpertFactors | None, rank: int, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    n_experts, d_out, d_in = shape
    lora_a, lora_b = np.zeros((n_experts, rank, d_in), np.float32), np.zeros((n_experts, d_out, rank), np.float32)
    if factors is not None:
        ids = list(factors.expert_ids)
        wanted = (len(ids), rank, d_in), (len(ids), d_out, rank)
        if (factors.lora_a.shape, factors.lora_b.shape) != wanted or not all(0 <= e < n_experts for e in ids):
            raise PayloadError(
                "bad_adapter",
                f"factors of {name} are {list(factors.lora_a.shape)} and {list(factors.lora_b.shape)} of experts "
                f"{ids[:8]}, the model needs {list(wanted[0])} and {list(wanted[1])} in 0..{n_experts - 1}: "
                "name the snapshot of the delta's base",
            )
        lora_a[ids], lora_b[ids] = factors.lora_a, factors.lora_b
    return lora_a, lora_b


def read_peft(directory: Path, shapes: Mapping[str, tuple[int, int, int]]) -> Delta:
    """Read a peft adapter of fused experts.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        shapes: (experts, d_out, d_in) of every fused expert parameter of the model that it was trained on.

    Returns:
        The delta of the experts that are not all zeros, bit by bit.

    Raises:
        PayloadError: reason ``bad_peft``, with the key or tensor, what is wrong and the remedy.
    """
    spec = _spec(_config(directory / CONFIG))
    tensors = _tensors(directory / TENSORS, spec, shapes)
    factors: dict[str, ExpertFactors] = {}
    for layer in sorted({expert_param(name)[0] for name in shapes}):
        names = [expert_name(layer, projection) for projection in PROJECTIONS]
        stacked = {name: _stacked(tensors, name, spec.rank, shapes[name]) for name in names}
        used = np.any([np.abs(each).max(axis=(1, 2)) > 0 for pair in stacked.values() for each in pair], axis=0)
        ids = np.flatnonzero(used)
        for name, (lora_a, lora_b) in stacked.items() if len(ids) else ():
            factors[name] = ExpertFactors(expert_ids=tuple(ids.tolist()), lora_a=lora_a[ids], lora_b=lora_b[ids])
    return Delta(spec=spec, factors=factors)


def _stacked(
    tensors: Mapping[str, np.ndarray], name: str, rank: int, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    n_experts, d_out, d_in = shape
    key_a, key_b = _keys(name)
    lora_b = tensors[key_b].reshape(d_out, rank, n_experts).transpose(2, 0, 1)
    return tensors[key_a].reshape(n_experts, rank, d_in), np.ascontiguousarray(lora_b)


def _config(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()[: _MAX_CONFIG_BYTES + 1]
        config = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise PayloadError(
            "bad_peft", f"{path} cannot be read ({type(error).__name__}): save the adapter again"
        ) from None
    if len(data) > _MAX_CONFIG_BYTES or not isinstance(config, dict):
        raise PayloadError("bad_peft", f"{path} must be a JSON object of at most 1 MiB: save the adapter again")
    return config


def _spec(config: Mapping[str, Any]) -> AdapterSpec:
    wanted = {"peft_type": "LORA", "bias": "none"}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            _refuse(key, config[key], f"must be {value}", "save a plain LoRA adapter")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        key = "rank_pattern" if config.get("rank_pattern") else "alpha_pattern"
        _refuse(key, config[key], "an update has one rank and one alpha for all layers", "train with a single r")
    # PiSSA and its kin change the base weights, so that the adapter is no difference to the snapshot.
    if not isinstance(config.get("init_lora_weights", True), bool) and config["init_lora_weights"] != "gaussian":
        _refuse("init_lora_weights", config["init_lora_weights"], "changes the base model", "use true or gaussian")
    if sorted(config.get("target_parameters") or []) != sorted(_TARGETS):
        _refuse(
            "target_parameters", config.get("target_parameters"), f"must be {', '.join(_TARGETS)}", "adapt both of them"
        )
    for key in sorted(set(config) - _SAYS_NOTHING - _MEANT):
        if config[key]:  # null, false, 0 and empty lists and mappings are off
            _refuse(key, config[key], "is not plain LoRA on experts", "train without it")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float):
        _refuse("r, lora_alpha", [rank, alpha], "must be an integer and a number", "save the adapter again")
    return AdapterSpec(rank=rank, alpha=float(alpha))


def _refuse(key: str, value: object, problem: str, remedy: str) -> None:
    raise PayloadError("bad_peft", f"{CONFIG}: {key} = {str(value)[:80]} {problem}: {remedy}")


def _tensors(path: Path, spec: AdapterSpec, shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, np.ndarray]:
    expected = {}
    for name, (n_experts, d_out, d_in) in shapes.items():
        key_a, key_b = _keys(name)
        expected[key_a], expected[key_b] = (n_experts * spec.rank, d_in), (d_out, spec.rank * n_experts)
    bound = _HEADER_BYTES + sum(512 + 4 * rows * columns for rows, columns in expected.values())
    tensors = _load(path, bound)
    if set(tensors) != set(expected):
        odd = min(set(tensors) ^ set(expected))
        raise PayloadError(
            "bad_peft",
            f"{path.name}: tensor {odd[:120]!r} is {'missing' if odd in expected else 'not one of this model'}: "
            "adapt both projections of every layer of this model",
        )
    for key, shape in expected.items():
        found = tensors[key]
        if found.dtype != np.float32 or found.shape != shape:
            raise PayloadError(
                "bad_peft",
                f"{path.name}: {key} must be float32 {list(shape)} at rank {spec.rank}, got {found.dtype} "
                f"{list(found.shape)}: save an adapter of this model with one rank, in fp32",
            )
        if not np.isfinite(found).all():
            raise PayloadError("bad_peft", f"{path.name}: {key} has NaN or infinite values: train it again")
    return tensors


def _load(path: Path, bound: int) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        size = path.stat().st_size
        if size > bound:
            raise PayloadError(
                "bad_peft", f"{path.name} has {size} bytes, an adapter of this model at most {bound}: check the model"
            )
        return load(path.read_bytes())
    except OSError as error:
        remedy = "save it with safe_serialization=True; a .bin file is a pickle and is not read"
        raise PayloadError("bad_peft", f"{path} cannot be read ({error.strerror}): {remedy}") from None
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise PayloadError(
            "bad_peft", f"{path.name} is not a safetensors file of numpy types ({error}): save it in fp32"
        ) from None

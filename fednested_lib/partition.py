"""Which parameter belongs to which loop: core, router or experts.

The slow loop trains `core` (embeddings, attention, norms) and experts at tier 1; devices adapt `experts` alone; the
`router` stays frozen on devices, so that all clients mean the same expert by the same number. One rule table per model
family maps the in-memory names of transformers 5 (experts fused into one tensor [E, d_out, d_in] per projection, which
`save_pretrained` splits again on disk) to a group. A name that no rule matches is an error, never a guess: a parameter
in the wrong group would be trained by nobody or sent by devices.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, get_args

from fednested_lib.errors import PartitionError

Group = Literal["core", "router", "experts"]
Projection = Literal["gate_up_proj", "down_proj"]

_LAYER = r"model\.layers\.(?:0|[1-9]\d*)\."
_EXPERT = re.compile(r"model\.layers\.(0|[1-9]\d*)\.mlp\.experts\.(gate_up_proj|down_proj)")

_EVERY_FAMILY: dict[str, Group] = {
    r"model\.embed_tokens\.weight|model\.norm\.weight|lm_head\.weight": "core",
    _LAYER + r"(?:input|post_attention)_layernorm\.weight": "core",
    _LAYER + r"self_attn\.[qkvo]_proj\.weight": "core",
    _LAYER + r"mlp\.gate\.weight": "router",
    _EXPERT.pattern: "experts",
}
_QUERY_KEY_NORM: dict[str, Group] = {
    _LAYER + r"self_attn\.[qk]_norm\.weight": "core",
    _LAYER + r"self_attn\.[qkvo]_proj\.bias": "core",
}
_DENSE_LAYERS: dict[str, Group] = {_LAYER + r"mlp\.(?:gate|up|down)_proj\.weight": "core"}

_RULES: dict[str, dict[str, Group]] = {
    "mixtral": _EVERY_FAMILY,
    "qwen3_moe": _EVERY_FAMILY | _QUERY_KEY_NORM | _DENSE_LAYERS,
    "olmoe": _EVERY_FAMILY | _QUERY_KEY_NORM,
}
FAMILIES: frozenset[str] = frozenset(_RULES)
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


def check_family(family: str) -> str:
    """Return `family`, the `model_type` of a transformers config.

    Raises:
        PartitionError: reason ``unknown_family``.
    """
    if family not in FAMILIES:
        raise PartitionError(
            "unknown_family",
            f"model family must be one of {', '.join(sorted(FAMILIES))}, got {family!r}: "
            "add its rules to fednested_lib/partition.py",
        )
    return family


@lru_cache(maxsize=65536)
def group_of(name: str, family: str) -> Group:
    """Return the group of one parameter.

    Args:
        name: in-memory parameter name, e.g. ``model.layers.0.mlp.gate.weight``.
        family: ``mixtral``, ``qwen3_moe`` or ``olmoe``.

    Raises:
        PartitionError: reason ``unnamed_parameter`` or ``unknown_family``.
    """
    groups = {group for pattern, group in _RULES[check_family(family)].items() if re.fullmatch(pattern, name)}
    if len(groups) != 1:
        raise PartitionError(
            "unnamed_parameter",
            f"no rule of family {family} names parameter {name!r}: add one to fednested_lib/partition.py",
        )
    return groups.pop()


def expert_param(name: str) -> tuple[int, Projection]:
    """Return (layer, projection) of a fused expert parameter.

    Raises:
        PartitionError: reason ``not_an_expert``.
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        raise PartitionError(
            "not_an_expert", f"{name[:120]!r} is not a fused expert parameter model.layers.<n>.mlp.experts.<projection>"
        )
    return int(match[1]), match[2]


def expert_name(layer: int, projection: Projection) -> str:
    """Return the name of a fused expert parameter, the inverse of `expert_param`."""
    return f"model.layers.{layer}.mlp.experts.{projection}"

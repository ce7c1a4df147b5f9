"""The first model of a federation: a Mixture-of-Experts class of transformers with seeded random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fednested_lib.errors import ConfigError
from fednested_lib.partition import check_family, group_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# 2.8 M parameters, 2.0 M of them in experts: learns Shakespeare in two minutes on two cores.
TINY_MIXTRAL: Mapping[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}


# transformers reads it from every family's config, but not every config class declares it.
_UNDECLARED = {"head_dim"}


def initial_model(family: str, config: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """Build a model with random fp32 weights; equal arguments give equal weights.

    Args:
        family: ``mixtral``, ``qwen3_moe`` or ``olmoe``.
        config: Keyword arguments of the family's transformers configuration class.
        seed: Of the weights.

    Raises:
        PartitionError: The family, or a parameter of the model, has no partition rule.
        ConfigError: ``config`` has a key that the family does not know, or values that make no model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(check_family(family))
    unknown = sorted(key for key in config if not hasattr(known, key) and key not in _UNDECLARED)
    if unknown:
        raise ConfigError(f"model.config has key {unknown[0]!r}, which {type(known).__name__} does not know: remove it")
    try:
        # A fork of the generator: building a model must not move the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, **config), dtype=torch.float32, experts_implementation="grouped_mm"
            )
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"model.config makes no {family} model ({error}): fix its sizes") from error
    for name, _ in model.named_parameters():
        group_of(name, family)
    return model

"""The first model of a federation: a Mixture-of-Experts class of transformers, its weights seeded or trained.

Trained weights come from a directory as `save_pretrained` writes it. There each expert has names of its own, which
transformers fuses while it loads: nothing else here reads such files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fednested_lib.errors import ConfigError, DataError
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


def pretrained_model(path: Path, family: str) -> PreTrainedModel:
    """Load an open model from a local directory, in fp32; nothing is downloaded.

    Args:
        path: Holds ``config.json`` and safetensors files.
        family: ``mixtral``, ``qwen3_moe`` or ``olmoe``.

    Raises:
        ConfigError: ``path`` is no such directory, or holds a model of another family.
        PartitionError: The family, or a parameter of the model, has no partition rule.
        DataError: Weights are missing, damaged, or of another shape than its configuration says.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    found = _model_type(path)
    if found != check_family(family):
        check_family(str(found))
        raise ConfigError(
            f"model.pretrained {path} is of family {found}, model.family says {family}: set it to {found}"
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            experts_implementation="grouped_mm",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"model.pretrained {path} cannot be loaded ({reason}): copy the model again") from error
    odd = sorted(map(str, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]))
    if odd:
        raise DataError(
            f"model.pretrained {path} does not have the weights of its config.json ({len(odd)} differ, first "
            f"{odd[0]}): copy the model again"
        )
    for name, _ in model.named_parameters():
        group_of(name, family)
    return model


def pretrained_tokenizer(path: Path, vocab_size: int) -> bytes:
    """Return the bytes of the tokenizer that belongs to a model of ``vocab_size`` tokens.

    Raises:
        ConfigError: There is none, or it has more tokens than the model.
        DataError: It has no end-of-text token.
        SnapshotError: It cannot be parsed.
    """
    from fednested_lib.text import end_of_text_id, load_tokenizer

    try:
        data = (path / "tokenizer.json").read_bytes()
    except OSError as error:
        raise ConfigError(
            f"model.pretrained {path} has no tokenizer.json ({error.strerror}): copy the one that it was trained with"
        ) from error
    tokenizer = load_tokenizer(data)
    end_of_text_id(tokenizer)
    if tokenizer.get_vocab_size() > vocab_size:
        raise ConfigError(
            f"tokenizer of model.pretrained {path} must have at most the model's {vocab_size} tokens, got "
            f"{tokenizer.get_vocab_size()}: it is another model's; copy the one that it was trained with"
        )
    return data


def check_positions(seq_len: int, config: Mapping[str, Any]) -> None:
    """Refuse rows of more tokens than the model has positions, which it would be trained beyond without a word.

    Args:
        seq_len: Predicted tokens per row.
        config: Of the model, as `describe_config` gives it.

    Raises:
        ConfigError: ``seq_len`` is above ``max_position_embeddings``.
    """
    bound = config.get("max_position_embeddings")
    if bound is not None and seq_len > bound:
        raise ConfigError(
            f"core.seq_len must be at most the model's max_position_embeddings of {bound}, got {seq_len}: lower it, or "
            "begin a federation with a model that has more"
        )


def _model_type(path: Path) -> object:
    try:
        return json.loads((path / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"model.pretrained {path} has no config.json with a model_type: give the directory of a transformers model"
        ) from error

"""Version 0, signed as the chain's first entry: a tokenizer and a model.

Either the tokenizer is trained on tier-1 text and the weights are seeded random numbers, or both are those of an open
model in a local directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from fednested_lib.errors import ChainConflict
from fednested_lib.log import UPDATES
from fednested_lib.snapshot import describe_config, write_state_dict
from tier1.federation import Federation
from tier1.versions.manifest import Genesis
from tier1.versions.state import ChainState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tier1.config import ModelConfig

log = structlog.get_logger()


def now_text() -> str:
    """Return the time as ISO 8601 UTC, for records; nothing is derived from it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def ensure_genesis(fed: Federation) -> ChainState:
    """Return the chain's state, making genesis first if the chain is empty.

    Raises:
        PolicyDenied: this principal may not train on a governed dataset; nothing is read.
        DataError: the tier-1 text is missing or too small for the vocabulary.
        ConfigError: model.config makes no model, or model.pretrained is none.
        TransportError: the log does not answer.
    """
    if not fed.chain.exists():
        try:
            fed.chain.append(_genesis(fed), 0)
        except ChainConflict:  # another process made the same one
            log.info("genesis.exists", home=str(fed.home))
    return fed.chain.state()


def _genesis(fed: Federation) -> Genesis:
    from tier1.aggregation.fold import numeric_profile

    settings, datasets = fed.config.model, fed.config.core.datasets
    for name in sorted(datasets):  # the tokenizer is trained on them: all are asked for before any is read
        fed.authorise("train", f"dataset:{name}", purpose="core-update")
    data, model = _given(settings.pretrained, settings.family) if settings.pretrained else _fresh(settings, datasets)
    tokenizer = fed.blobs.put(data)
    blobs = write_state_dict(model.state_dict(), settings.family, fed.blobs)
    log.info("genesis.made", family=settings.family, parameters=model.num_parameters(), blobs=len(blobs))
    return Genesis(
        federation=fed.config.federation,
        family=settings.family,
        model=describe_config(model.config),
        tokenizer=tokenizer,
        blobs=blobs,
        profile=numeric_profile(),
        offsets={str(partition): high for partition, (_, high) in fed.log.watermarks(UPDATES).items()},
        trainer=fed.config.identity.principal,
        created_at=now_text(),
    )


def _fresh(settings: ModelConfig, datasets: Mapping[str, Path]) -> tuple[bytes, PreTrainedModel]:
    from tier1.training.model import TINY_MIXTRAL, initial_model
    from tier1.training.sources import texts_of
    from tier1.training.tokenizer import train_tokenizer

    texts = (text for name in sorted(datasets) for text in texts_of(datasets[name]))
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    shape = {
        **(TINY_MIXTRAL if settings.family == "mixtral" else {}),
        **settings.config,
        "vocab_size": settings.vocab_size,
    }
    return tokenizer, initial_model(settings.family, shape, settings.seed)


def _given(path: Path, family: str) -> tuple[bytes, PreTrainedModel]:
    from tier1.training.model import pretrained_model, pretrained_tokenizer

    model = pretrained_model(path, family)
    return pretrained_tokenizer(path, model.config.vocab_size), model

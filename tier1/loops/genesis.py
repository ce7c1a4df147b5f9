"""Version 0: the tokenizer from tier-1 text and a model of seeded random weights, signed as the chain's first entry."""

from __future__ import annotations

from datetime import datetime, timezone

import structlog

from fednested_lib.errors import ChainConflict
from fednested_lib.log import UPDATES
from fednested_lib.snapshot import describe_config, write_state_dict
from tier1.federation import Federation
from tier1.versions.manifest import Genesis
from tier1.versions.state import ChainState

log = structlog.get_logger()


def now_text() -> str:
    """Return the time as ISO 8601 UTC, for records; nothing is derived from it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def ensure_genesis(fed: Federation) -> ChainState:
    """Return the chain's state, making genesis first if the chain is empty.

    Raises:
        PolicyDenied: this principal may not train on a governed dataset; nothing is read.
        DataError: the tier-1 text is missing or too small for the vocabulary.
        ConfigError: model.config makes no model.
        TransportError: the log does not answer.
    """
    if not fed.chain.exists():
        try:
            fed.chain.append(_genesis(fed), 0)
        except ChainConflict:  # another process made the same one
            log.info("genesis.exists", home=str(fed.home))
    return fed.chain.state()


def _genesis(fed: Federation) -> Genesis:
    from fednested_lib.text import read_texts
    from tier1.aggregation.fold import numeric_profile
    from tier1.training.model import TINY_MIXTRAL, initial_model
    from tier1.training.tokenizer import train_tokenizer

    settings, datasets = fed.config.model, fed.config.core.datasets
    for name in sorted(datasets):  # the tokenizer is trained on them: all are asked for before any is read
        fed.authorise("train", f"dataset:{name}", purpose="core-update")
    texts = (text for name in sorted(datasets) for text in read_texts(datasets[name])[0])
    tokenizer = fed.blobs.put(train_tokenizer(texts, settings.vocab_size))
    shape = {
        **(TINY_MIXTRAL if settings.family == "mixtral" else {}),
        **settings.config,
        "vocab_size": settings.vocab_size,
    }
    model = initial_model(settings.family, shape, settings.seed)
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

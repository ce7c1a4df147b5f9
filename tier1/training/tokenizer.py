"""The federation's tokenizer: byte-level BPE (Sennrich et al., arXiv:1508.07909; bytes as in GPT-2).

It is trained on tier-1 text only: a vocabulary learned from device text would tell which strings the devices hold. The
256 byte symbols are always in it, so that any device's text encodes and decodes exactly, merely longer.
"""

from __future__ import annotations

from collections.abc import Iterable

from fednested_lib.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # end of text and the 256 bytes


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> bytes:
    """Train a tokenizer; equal texts in equal order give equal bytes.

    Args:
        texts: Tier-1 texts, consumed once.
        vocab_size: Number of tokens, at least 257.

    Returns:
        The bytes of a ``tokenizer.json`` whose token 0 is the end of text.

    Raises:
        ConfigError: ``vocab_size`` is below 257.
        DataError: The texts are too few for a vocabulary of this size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocabulary size must be at least {MIN_VOCAB_SIZE}, got {vocab_size}: set model.vocab_size")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise DataError(
            f"tier-1 text yields a vocabulary of {found} tokens, model.vocab_size asks for {vocab_size}: "
            "add tier-1 text or lower model.vocab_size"
        )
    return tokenizer.to_str().encode("utf-8")

"""What packed rows must give when documents are masked: each document's loss in a pass of its own."""

from __future__ import annotations

from itertools import pairwise

import torch

from tier1.training.loss import batch_loss
from tier1.training.model import initial_model
from tier1.training.settings import TrainSettings

END = 0
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "mixtral": SHAPE | {"num_local_experts": 4},
    "qwen3_moe": SHAPE | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "olmoe": SHAPE | {"num_experts": 4},
}


def packed_rows():
    """Return rows of documents of 1 to 30 tokens: two ends in turn, none, one at either edge, one."""
    rows = torch.randint(1, 300, (4, 49), generator=torch.Generator().manual_seed(1))
    for row, ends in enumerate(([9, 10, 40], [], [0, 31, 48], [20])):
        rows[row, ends] = END
    return rows


def documents_of(row):
    """Return (tokens read, tokens predicted) per document of a row, found by plain search."""
    begins = [0, *(n for n in range(1, len(row) - 1) if row[n] == END), len(row) - 1]
    return [(row[begin:end], row[begin + 1 : end + 1]) for begin, end in pairwise(begins)]


@torch.no_grad()
def mean_alone(model, rows):
    """Return the token-weighted mean loss of all documents, each in a pass of its own."""
    nats, n_tokens = 0.0, 0
    for row in rows:
        for read, predicted in documents_of(row):
            logits = model(input_ids=read[None], use_cache=False).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, predicted, reduction="sum").item()
            n_tokens += len(predicted)
    assert n_tokens == rows[:, 1:].numel(), "every token but a row's first is predicted once"
    return nats / n_tokens


def enlarged(family):
    """Return a model with weights so large that what a token looks at shows in its loss."""
    model = initial_model(family, FAMILIES[family], 0).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4)
    return model


@torch.no_grad()
def apart_from_alone(model, rows, end):
    """Return the relative difference of the loss of packed rows, masked at `end`, from that of the documents alone."""
    alone = mean_alone(model, rows)
    return abs(batch_loss(model, rows, TrainSettings(steps=1, document_end=end))[1].item() - alone) / alone

"""What one training step minimises, the same for every backend.

    L = CE(next token) + c_aux · L_aux + Σ terms
    L_aux = mean over layers l of E · Σ_e f_le · P_le                         (Switch Transformer, arXiv:2101.03961)

f_le is the share of tokens that layer l routes to expert e and P_le its mean router probability; without L_aux a few
experts take all tokens. transformers takes both over all layers together, so that an expert without tokens in one layer
is made up for by that of its number in another, and stays dead. On several ranks f_le is that of the global batch, for
the product of two means is not the mean of the products: with it, n ranks compute the gradient that one would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from tier1.training.documents import positions_of
from tier1.training.ranks import ALONE, Ranks
from tier1.training.settings import TrainSettings


class Term(Protocol):
    """Something added to the loss of a batch: a safeguard against forgetting."""

    def __call__(self, model: nn.Module, rows: Tensor, output: MoeCausalLMOutputWithPast) -> Tensor:
        """Return the scalar to add, nats per token; its mean over the ranks is what the global batch adds.

        Args:
            model: What is trained.
            rows: int64 [batch / ranks, seq_len + 1] token ids.
            output: The model's for ``rows[:, :-1]``.
        """


def batch_loss(
    model: nn.Module, rows: Tensor, settings: TrainSettings, ranks: Ranks = ALONE, terms: Sequence[Term] = ()
) -> tuple[Tensor, Tensor]:
    """Return what is minimised for this rank's rows, and of it the next-token loss (detached), nats per token.

    Args:
        model: Transformers MoE model.
        rows: int64 [batch / ranks, seq_len + 1] token ids, on the model's device.
        settings: Gives c_aux and whether documents are masked.
        ranks: Those that share the batch.
        terms: Added to the loss.

    Raises:
        TransportError: Another rank is gone.
    """
    tokens, end = rows[:, :-1], settings.document_end
    positions = None if end is None else positions_of(tokens, end)
    output = model(input_ids=tokens, position_ids=positions, output_router_logits=True, use_cache=False)
    loss = nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    top_k = getattr(model, "module", model).config.num_experts_per_tok  # an engine wraps the model
    total = loss + settings.aux_loss * balancing_loss(output.router_logits, top_k, ranks)
    for term in terms:
        total = total + term(model, rows, output)
    return total, loss.detach()


def balancing_loss(router_logits: tuple[Tensor, ...], top_k: int, ranks: Ranks = ALONE) -> Tensor:
    """Return this rank's part of L_aux: its mean over the ranks, in value and gradient, is that of the global batch.

    Args:
        router_logits: [T, E] per layer.
        top_k: Experts per token.
        ranks: Those that share the batch; alone, and with one layer, the value is transformers'.

    Raises:
        TransportError: Another rank is gone.
    """
    n_experts, chosen, probability = router_logits[0].shape[-1], [], []
    for logits in router_logits:
        weights = nn.functional.softmax(logits, dim=-1)
        experts = torch.topk(weights, top_k, dim=-1)[1].flatten()
        chosen.append(torch.bincount(experts, minlength=n_experts).float() / len(logits))
        probability.append(weights.float().mean(dim=0))
    share = torch.stack(chosen)
    ranks.mean_([share])
    return n_experts * torch.sum(share * torch.stack(probability)) / len(router_logits)

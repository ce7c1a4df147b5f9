"""What one training step minimises, the same for every backend.

    L = CE(next token) + c_aux · L_aux + Σ terms,    L_aux = E · Σ_e f_e · P_e   (Switch Transformer, arXiv:2101.03961)

f_e is the share of tokens routed to expert e and P_e its mean router probability; without L_aux a few experts take all
tokens. On several ranks f_e is that of the global batch, for the product of two means is not the mean of the products:
with it, n ranks compute the gradient that one would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

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
        settings: Gives c_aux.
        ranks: Those that share the batch.
        terms: Added to the loss.

    Raises:
        TransportError: Another rank is gone.
    """
    output = model(input_ids=rows[:, :-1], output_router_logits=True, use_cache=False)
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
        ranks: Those that share the batch; alone, the value is transformers' to the bit.

    Raises:
        TransportError: Another rank is gone.
    """
    n_experts, n_tokens = router_logits[0].shape[-1], sum(len(logits) for logits in router_logits)
    chosen, probability = 0.0, 0.0
    for logits in router_logits:
        weights = nn.functional.softmax(logits, dim=-1)
        experts = torch.topk(weights, top_k, dim=-1)[1].flatten()
        chosen = chosen + torch.bincount(experts, minlength=n_experts).float()
        probability = probability + weights.float().sum(dim=0)
    share = chosen / n_tokens
    ranks.mean_([share])
    return torch.sum(share * (probability / n_tokens)) * n_experts

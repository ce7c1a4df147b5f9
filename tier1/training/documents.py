"""Documents in a packed row: which tokens one position may look at.

    start_t = [token_t is the end-of-text token],    p_t = t − max{s ≤ t : start_s or s = 0}

A position belongs to the document of the token that it predicts. So the end-of-text token opens the document after it:
the first token of a document is predicted from that token alone, as where generation begins, the end of a document is
predicted from all of it, and no label is lost or depends on another document. Every row has as many labels as any
other, so a mean over passes and ranks is the mean over tokens.

transformers builds the block-diagonal causal mask itself where positions restart within a row (and no cache or mask is
passed). A document that a row cuts off goes on in the next one without what was before, masks or not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def positions_of(tokens: Tensor, end: int) -> Tensor:
    """Return the position of every token within its document.

    Args:
        tokens: int64 [rows, T] ids that a model reads.
        end: Id of the end-of-text token.

    Returns:
        int64 [rows, T], 0 where a document or a row begins.
    """
    n = torch.arange(tokens.shape[1], device=tokens.device)
    starts = torch.where(tokens == end, n, 0)
    return n - starts.cummax(dim=1).values

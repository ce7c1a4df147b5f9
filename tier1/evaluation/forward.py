"""One pass of a model over a suite's rows: losses, hits and routing come from the same logits.

    nats_i = −Σ_t log p(x_t | x_<t),    hits_i = #{t : x_t = argmax p(· | x_<t)},    routed_le = slots of expert e

What the routers chose is read off their outputs, k experts a token, and never computed a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fednested_lib.partition import group_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class RowFigures:
    """Figures of n rows.

    Args:
        nats: float64 [n], sum over the tokens of a row; not finite if the model's output is not.
        hits: int64 [n], tokens that were the model's first choice.
        routed: layer → int64 [E], token slots that the router gave to each expert.
    """

    nats: np.ndarray
    hits: np.ndarray
    routed: dict[int, np.ndarray]


def run_rows(model: nn.Module, tokens: np.ndarray, batch_size: int) -> RowFigures:
    """Run a model over rows.

    Args:
        model: causal MoE language model; it is put into evaluation mode.
        tokens: int32 [n, seq_len + 1].
        batch_size: rows at a time; memory only.
    """
    import torch

    from fednested_lib.training import deterministic

    model.eval()
    nats, hits = [], []
    with deterministic(), torch.inference_mode(), _routing(model) as routed:
        for start in range(0, len(tokens), batch_size):
            batch = torch.from_numpy(tokens[start : start + batch_size].astype(np.int64)).to(model.device)
            logits, wanted = model(input_ids=batch[:, :-1], use_cache=False).logits, batch[:, 1:]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), wanted.flatten(), reduction="none"
            ).reshape(wanted.shape)
            nats.append(loss.double().sum(dim=1).cpu().numpy())
            hits.append((logits.argmax(dim=-1) == wanted).sum(dim=1).cpu().numpy())
    return RowFigures(nats=np.concatenate(nats), hits=np.concatenate(hits), routed=routed)


@contextmanager
def _routing(model: nn.Module) -> Iterator[dict[int, np.ndarray]]:
    """Count, while it is open, the token slots that each expert gets."""
    import torch

    counts: dict[int, np.ndarray] = {}

    def count(layer: int, n_experts: int, _router: nn.Module, _given: tuple, output: tuple) -> None:
        chosen = torch.bincount(output[2].flatten(), minlength=n_experts)
        counts[layer] = counts.get(layer, 0) + chosen.cpu().numpy()

    hooks = []
    for name, parameter in model.named_parameters():
        if group_of(name, model.config.model_type) == "router" and name.endswith(".weight"):
            router, layer = model.get_submodule(name.removesuffix(".weight")), int(name.split(".")[2])
            hooks.append(router.register_forward_hook(partial(count, layer, len(parameter))))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()

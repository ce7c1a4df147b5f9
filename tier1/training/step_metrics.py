"""What a run says of its steps: loss, gradient, rate, router, speed and memory, every so many of them.

    aux_loss  mean over layers of E · Σ_e f_e · P_e: the L_aux of `loss.py`, here of the whole batch, before c_aux
    load_max  max over layers and experts of n_e · E / Σ n: 1 is even, E / k is one expert that every token goes to
    load_min  the least of them: 0 is an expert that no token of the step went to

n_e is how many tokens went to expert e. The router is watched from outside the loss, through the model's output, so
what is measured changes no bit of what is trained; rows that safeguards draw are not counted. Sums are those of all
ranks. Only rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from tier1.training.meter import Meter
from tier1.training.ranks import Ranks
from tier1.training.settings import TrainSettings

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """How often steps are measured, and where to.

    Args:
        every: Steps between two measured ones, ≥ 1.
        write: Receives the row of each; must not raise. None: they are events alone.
        peak_flops: FLOP/s that one rank can do at most, for the MFU; None: the data sheet's of a known GPU, else there
            is no MFU.
    """

    every: int
    write: Callable[[Mapping[str, float]], None] | None = None
    peak_flops: float | None = None


class StepRecorder:
    """Measures the steps of one run; every rank has one and calls it alike. ``metrics`` None: nothing is measured."""

    def __init__(self, metrics: StepMetrics | None, model: nn.Module, meter: Meter, ranks: Ranks):
        self._metrics, self._meter, self._ranks = metrics, meter.again(), ranks
        self._router = RouterWatch(model) if metrics else None

    def before(self, step: int) -> None:
        """Watch the router in the step that comes, if it is to be measured."""
        if self._metrics and step % self._metrics.every == 0:
            self._router.begin()

    def after(self, step: int, settings: TrainSettings, *, loss: float, grad_norm: float, tokens: int) -> None:
        """Count the step's tokens over all ranks and write its row, if it is to be written.

        Raises:
            TransportError: Another rank is gone.
        """
        self._meter.count(tokens)
        if not self._metrics or step % self._metrics.every:
            return
        router, speed = self._router.end(self._ranks), self._meter.read()
        self._meter = self._meter.again()
        if self._ranks.rank:
            return
        row = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": settings.learning_rate * settings.factor(step),
            **router,
            "tokens_per_s": speed.tokens_per_s,
            "memory_mib": speed.memory_mib,
            **({} if speed.mfu is None else {"mfu": speed.mfu}),
        }
        log.info("core.step", **row)
        if self._metrics.write:
            self._metrics.write({**row, "at_ms": int(time.time() * 1000)})

    def close(self) -> None:
        """Leave the model as it was."""
        if self._router:
            self._router.close()


class RouterWatch:
    """Sums up what routers do between `begin` and `end`, whatever engine the model is given to afterwards."""

    def __init__(self, model: nn.Module):
        self._top_k, self._on = model.config.num_experts_per_tok, False
        self._handle = model.register_forward_hook(self._see)

    def begin(self) -> None:
        """Start anew."""
        self._on, self._sums = True, None

    def end(self, ranks: Ranks) -> dict[str, float]:
        """Return L_aux and load over all ranks; every rank calls."""
        self._on = False
        ranks.mean_([self._sums])  # shares do not change with the number of ranks
        chosen, probability = self._sums.unbind()  # [L, E] each
        n_experts, n_tokens = chosen.shape[1], chosen[0].sum() / self._top_k
        load = chosen * n_experts / chosen.sum(dim=1, keepdim=True)
        aux = n_experts * torch.sum(chosen / n_tokens * (probability / n_tokens), dim=1).mean()
        return {"aux_loss": aux.item(), "load_max": load.max().item(), "load_min": load.min().item()}

    def close(self) -> None:
        """Let go of the model."""
        self._handle.remove()

    @torch.no_grad()
    def _see(self, model: nn.Module, args: tuple, output: MoeCausalLMOutputWithPast) -> None:
        logits = getattr(output, "router_logits", None)
        if self._on and model.training and logits:
            sums = torch.stack([torch.stack(_layer(of_layer, self._top_k)) for of_layer in logits], dim=1)
            self._sums = sums if self._sums is None else self._sums + sums


def _layer(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return tokens and summed probability per expert, [E] each, of router logits [T, E]."""
    weights = nn.functional.softmax(logits.detach().float(), dim=-1)
    chosen = torch.topk(weights, top_k, dim=-1)[1].flatten()
    return torch.bincount(chosen, minlength=logits.shape[-1]).float(), weights.sum(dim=0)

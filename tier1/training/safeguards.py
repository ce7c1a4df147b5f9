"""What keeps a training run from erasing what the model knew: terms of the loss, their settings, and who is frozen.

    replay        + w · CE(old rows)                                   rehearsal (Robins 1995)
    distillation  + w · KL(p_base ‖ p) on old rows                     LwF, arXiv:1606.09282; DER++, arXiv:2004.07211
    EWC           + w/2 · Σ_i F_i · (θ_i − θ*_i)²                      arXiv:1612.00796, online: arXiv:1805.06370
    freeze        experts to which old rows send a large share of their tokens stay as they are
    frequencies   a group moves every n-th step, or never (`tier1/training/pace.py`)

θ* and p_base are the weights the run starts from. F_i is the diagonal Fisher information per token, summed over the
runs before this one, each at the weights it ended with: EWC alone needs no old text. Replay and distillation need some
(the rehearsal rows) and keep far more of it. Each works alone; several add up. All that they are is a function of
base, rows and settings, and which rows a step draws follows from the random numbers that the trainer seeds rank 0
with, so that a resumed run ends with the same bits and n ranks rehearse the rows that one would.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from fednested_lib.partition import expert_param, group_of
from fednested_lib.training import deterministic
from tier1.training.documents import positions_of
from tier1.training.loss import Term
from tier1.training.pace import Frequencies, Period
from tier1.training.ranks import ALONE, Ranks

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """Replay or distillation: ``weight`` ≥ 0 of the term, and ``rows`` ≥ 1 that a step draws, over all ranks."""

    weight: float = 1.0
    rows: int = 8


@dataclass(frozen=True, kw_only=True)
class Ewc:
    """EWC: ``weight`` ≥ 0, ``rows`` ≥ 1 that a Fisher is taken from, ``decay`` 0..1 of the earlier runs' Fisher."""

    weight: float
    rows: int = 128
    decay: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Freeze:
    """Freeze each expert that takes at least ``share`` (0..1) of the old rows' assignments in its layer."""

    share: float


@dataclass(frozen=True, kw_only=True)
class Safeguards:
    """Which safeguards a run has; None is off."""

    replay: Rehearsed | None = None
    distillation: Rehearsed | None = None
    ewc: Ewc | None = None
    freeze: Freeze | None = None
    frequencies: Frequencies | None = None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is known of the old domains when a run starts.

    Args:
        rows: Integer [n, seq_len + 1] of old text; replay, distillation and freezing need at least one.
        fisher: Parameter name → diagonal Fisher information; a parameter without one is free.
    """

    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 1), np.int32))
    fisher: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Content hash: runs that protect different things are different runs."""
        content = hashlib.sha256(repr((self.rows.shape, sorted(self.fisher))).encode())
        for array in (self.rows, *(self.fisher[name].numpy() for name in sorted(self.fisher))):
            content.update(np.ascontiguousarray(array).tobytes())
        return content.hexdigest()


def terms_of(
    safeguards: Safeguards,
    memory: Memory,
    base: nn.Module,
    ranks: Ranks = ALONE,
    end: int | None = None,
    passes: int = 1,
) -> list[Term]:
    """Return what the safeguards add to the loss of a run that starts from ``base``, which each rank has whole.

    Args:
        safeguards: Which are on.
        memory: What they protect.
        base: The model, not trained yet.
        ranks: Those that train together.
        end: Token that ends a document, where documents are masked (`tier1/training/documents.py`).
        passes: Through which a step of a rank goes; the terms are called in each.
    """
    terms: list[Term] = []
    if safeguards.replay:
        terms.append(Replay(safeguards.replay, memory.rows, ranks, end, passes))
    if safeguards.distillation:
        terms.append(Distillation(safeguards.distillation, memory.rows, base, ranks, end, passes))
    if safeguards.ewc and memory.fisher:
        terms.append(Consolidation(safeguards.ewc.weight, memory.fisher, base))
    return terms


def periods_of(
    safeguards: Safeguards,
    memory: Memory,
    base: nn.Module,
    family: str,
    ranks: Ranks = ALONE,
    end: int | None = None,
) -> dict[str, Period]:
    """Return the period of each parameter that does not move at every step; rank 0 says how many experts stay."""
    periods: dict[str, Period] = {}
    if safeguards.frequencies:
        periods = safeguards.frequencies.periods(base, family)
    if safeguards.freeze:
        shares = routed_shares(base, memory.rows, end)
        if ranks.rank == 0:
            _say_frozen(shares, safeguards.freeze.share)
        experts = {name: each for name, each in base.named_parameters() if group_of(name, family) == "experts"}
        # A dense layer has no row: what the shares number is the layers that have experts.
        row_of = {layer: row for row, layer in enumerate(sorted({expert_param(name)[0] for name in experts}))}
        for name, parameter in experts.items():
            own = periods.get(name, 1)
            own = list(own) if isinstance(own, Sequence) else [own] * len(parameter)
            needed = shares[row_of[expert_param(name)[0]]] >= safeguards.freeze.share
            periods[name] = [None if frozen else period for frozen, period in zip(needed, own, strict=True)]
    return periods


def _say_frozen(shares: np.ndarray, bound: float) -> None:
    frozen = int((shares >= bound).sum())
    say = log.info if frozen else log.warning
    largest = round(float(shares.max()), 3)
    say("core.experts_frozen", frozen=frozen, experts=shares.size, share=bound, largest_share=largest)


class Rehearsal:
    """Rows of a step: drawn from the old ones for all ranks together, of which each has an equal share.

    A step draws them once, whatever its passes; these have parts of them that differ by at most one row.

    Args:
        rows: Integer [n ≥ 1, seq_len + 1].
        n: How many a step draws, rounded up to a multiple of the ranks.
        salt: Another one draws other rows.
        ranks: Those that share them.
        passes: Through which a step of a rank goes.
    """

    def __init__(self, rows: np.ndarray, n: int, salt: int, ranks: Ranks = ALONE, passes: int = 1):
        assert len(rows), "replay and distillation need old rows"
        self._rows, self._salt, self._ranks, self._passes = rows, salt, ranks, passes
        self._n = math.ceil(n / ranks.world_size) * ranks.world_size
        self._waiting: list[Tensor] = []

    def draw(self) -> tuple[Tensor, float]:
        """Return this rank's rows of the next pass, int64, and the weight of their mean; every rank calls.

        The mean over the passes of weight · mean over the rows is the mean over the rows of the step.
        """
        if not self._waiting:
            share = self._ranks.first(self._draw)[self._ranks.share_of(self._n)]
            self._waiting = list(torch.from_numpy(self._rows[share].astype(np.int64)).tensor_split(self._passes))
        part = self._waiting.pop(0)
        return part, len(part) * self._passes * self._ranks.world_size / self._n

    def _draw(self) -> list[int]:
        # By the seed that the trainer gives to run and step, apart from what dropout has taken since.
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([torch.initial_seed(), self._salt])))
        return generator.integers(len(self._rows), size=self._n).tolist()


class Replay:
    """CE of rows drawn from the old ones: the next-token loss that they had."""

    def __init__(
        self, settings: Rehearsed, rows: np.ndarray, ranks: Ranks = ALONE, end: int | None = None, passes: int = 1
    ):
        self._end = end
        self._weight, self._rehearsal = settings.weight, Rehearsal(rows, settings.rows, 1, ranks, passes)

    def __call__(self, model: nn.Module, rows: Tensor, output: MoeCausalLMOutputWithPast) -> Tensor:
        """Return weight · CE, nats per token."""
        old, weight = self._rehearsal.draw()
        if not len(old):
            return torch.zeros((), device=rows.device)
        old = old.to(rows.device)
        logits = model(**_read(old[:, :-1], self._end), use_cache=False).logits
        return self._weight * weight * nn.functional.cross_entropy(logits.flatten(0, 1), old[:, 1:].flatten())


class Distillation:
    """KL(p_base ‖ p) per token on rows drawn from the old ones: the base's whole distribution, not the text alone."""

    def __init__(
        self,
        settings: Rehearsed,
        rows: np.ndarray,
        base: nn.Module,
        ranks: Ranks = ALONE,
        end: int | None = None,
        passes: int = 1,
    ):
        self._end = end
        self._weight, self._rehearsal = settings.weight, Rehearsal(rows, settings.rows, 2, ranks, passes)
        self._teacher = copy.deepcopy(base).to(ranks.device).eval().requires_grad_(False)

    def __call__(self, model: nn.Module, rows: Tensor, output: MoeCausalLMOutputWithPast) -> Tensor:
        """Return weight · KL, nats per token."""
        old, weight = self._rehearsal.draw()
        if not len(old):
            return torch.zeros((), device=rows.device)
        old = old[:, :-1].to(rows.device)
        with torch.no_grad():
            wanted = self._teacher(**_read(old, self._end), use_cache=False).logits
        found = model(**_read(old, self._end), use_cache=False).logits
        return self._weight * weight * divergence(wanted, found)


class Consolidation:
    """EWC: a spring at every weight of the base, as stiff as the old domains' Fisher information."""

    def __init__(self, weight: float, fisher: Mapping[str, Tensor], base: nn.Module):
        parameters = dict(base.named_parameters())
        self._weight = weight
        self._springs = {
            name: (stiffness.to(parameters[name].device), parameters[name].detach().clone())
            for name, stiffness in fisher.items()
        }

    def __call__(self, model: nn.Module, rows: Tensor, output: MoeCausalLMOutputWithPast) -> Tensor:
        """Return weight/2 · Σ F·(θ − θ*)², nats per token."""
        parameters = dict(model.named_parameters())
        energies = [
            (stiffness * (parameters[name] - rest).square()).sum() for name, (stiffness, rest) in self._springs.items()
        ]
        return self._weight / 2 * torch.stack(energies).sum()


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return KL(softmax wanted ‖ softmax found), mean over all but the last dimension, nats."""
    log_wanted, log_found = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return (log_wanted.exp() * (log_wanted - log_found)).sum(-1).mean()


def fisher_diagonal(
    model: nn.Module, rows: np.ndarray, ranks: Ranks = ALONE, end: int | None = None
) -> dict[str, Tensor]:
    """Return E[(∂ log p(x_t) / ∂θ_i)²] per parameter, the empirical diagonal Fisher information of a token.

    Tokens of a row have uncorrelated scores if the model is right, so a row of T tokens gives one sample of T times it:
    one backward pass a row, F = mean over rows of (∇ Σ_t log p)² / T.

    Args:
        model: Any causal language model; left as it is.
        rows: Integer [n ≥ 1, seq_len + 1].
        ranks: Those that share the rows and have the same model; every rank calls and gets the whole.
        end: Token that ends a document, where documents are masked.

    Returns:
        fp32 on the CPU, by parameter name; tied weights count once.
    """
    parameters = dict(model.named_parameters())
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    was_training = model.training
    model.eval()
    with deterministic(), torch.enable_grad():
        own = rows[ranks.rank :: ranks.world_size].astype(np.int64)
        for row in torch.from_numpy(own).to(next(iter(parameters.values())).device):
            logits = model(**_read(row[None, :-1], end), use_cache=False).logits[0].float()
            nats = nn.functional.cross_entropy(logits, row[1:], reduction="sum")
            scores = torch.autograd.grad(nats, list(parameters.values()), allow_unused=True)
            for name, score in zip(parameters, scores, strict=True):
                if score is not None:  # an expert that no token reached
                    fisher[name] += score.square() * (ranks.world_size / (len(rows) * (len(row) - 1)))
    ranks.mean_(list(fisher.values()))
    model.train(was_training)
    return {name: tensor.detach().cpu().float() for name, tensor in fisher.items()}


def routed_shares(model: nn.Module, rows: np.ndarray, end: int | None = None, batch_rows: int = 32) -> np.ndarray:
    """Return [layers with experts, E]: the share of the rows' token assignments that each expert has; rows sum to 1."""
    top_k, counts = model.config.num_experts_per_tok, 0
    was_training = model.training
    model.eval()
    with deterministic(), torch.inference_mode():
        for start in range(0, len(rows), batch_rows):
            batch = torch.from_numpy(rows[start : start + batch_rows, :-1].astype(np.int64)).to(model.device)
            read = {**_read(batch, end), "output_router_logits": True, "use_cache": False}
            layers = model(**read, logits_to_keep=1).router_logits
            chosen = [logits.softmax(-1).topk(top_k, -1).indices.flatten() for logits in layers]
            counts = counts + torch.stack([e.bincount(minlength=layers[0].shape[-1]) for e in chosen]).cpu()
    model.train(was_training)
    shares = counts.double() / counts.sum(-1, keepdim=True)
    return shares.numpy()


def _read(tokens: Tensor, end: int | None) -> dict[str, Tensor]:
    """Return what a model reads of rows, as the trainer's own loss lets it."""
    return {"input_ids": tokens} if end is None else {"input_ids": tokens, "position_ids": positions_of(tokens, end)}

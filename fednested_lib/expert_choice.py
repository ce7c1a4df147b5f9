"""Which experts a device adapts: those that its own text is routed to most, within a budget, and then always the same.

    profile    one forward pass over a bounded sample of the device's text: routed tokens and distinct tokens per
               expert and layer
    choose     the experts with most routed tokens among those that saw as many distinct tokens as may leave (the
               sidecar's floor): n per layer, or as many in all as the fp32 factors of which fit a number of megabytes
    keep       the choice is a file of the device's home and stays, whatever base versions come, until a person or
               `period_days` ends the period: a choice made anew for every update would tell what that text was about

What a device sends names its experts, so a choice tells tier 1 once, for the whole period, which experts the text is
routed to, and nothing more until it is over. The sidecar holds the trainer to it (one set of experts per version of the
policy, or per `experts_period_days` of it). The file holds numbers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fednested_lib.blobs import write_durable
from fednested_lib.config import AdaptersConfig, BudgetConfig
from fednested_lib.envelope import Layer
from fednested_lib.errors import ConfigError, DataError, StorageError
from fednested_lib.partition import expert_param
from fednested_lib.signing import canonical_json

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLE_TOKENS = 16_384  # of a profile: enough to rank experts, a few seconds on a small device
DAY_S = 86_400
DISTINCT_PER_RANK = 4  # below this × rank an expert is withheld by every policy that keeps to the default
_REMEDY = "run `fednested tier2 forget-experts --config …` to choose anew"
_Counts = dict[Layer, list[int]]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where a text went in one layer: routed tokens [E] and distinct vocabulary entries [E] per expert."""

    tokens: np.ndarray
    distinct: np.ndarray


class Choice(BaseModel):
    """The experts of one period, the rule that they were chosen by, and the counts of each in the sample."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    chosen_s: int = Field(default=0, ge=0)  # seconds since the epoch
    base_version: int = Field(ge=0)
    sample_tokens: int = Field(ge=1)
    rank: int = Field(ge=1)
    budget: BudgetConfig
    experts: _Counts
    tokens: _Counts
    distinct_tokens: _Counts

    def layers(self) -> dict[int, tuple[int, ...]]:
        """Return layer → ascending expert ids; layers without any are left out."""
        return {int(layer): tuple(ids) for layer, ids in self.experts.items() if ids}


def profile(model: nn.Module, rows: np.ndarray, *, max_tokens: int = SAMPLE_TOKENS) -> tuple[dict[int, Routing], int]:
    """Run a model over a sample of rows and count where its tokens went.

    Args:
        model: transformers MoE model with fused experts, in fp32 or quantised.
        rows: int32 [n, seq_len + 1]; the sample is evenly spaced among them.
        max_tokens: of the sample; at least one row is taken.

    Returns:
        Layer → counts, and the number of tokens of the sample.
    """
    import torch

    from fednested_lib.adapters import experts_modules
    from fednested_lib.training import deterministic

    assert len(rows)
    n_rows = min(len(rows), max(1, max_tokens // (rows.shape[1] - 1)))
    sample = torch.from_numpy(rows[np.arange(n_rows) * len(rows) // n_rows, :-1].astype(np.int64)).to(model.device)
    times: dict[int, Tensor] = {}
    hooks = []
    for layer, module in experts_modules(model).items():
        times[layer] = torch.zeros(module.num_experts, model.config.vocab_size, dtype=torch.int64, device=model.device)

        def count(_module: nn.Module, args: tuple, table_ev: Tensor = times[layer]) -> None:
            index_nk = args[1]
            token_nk = row.reshape(-1, 1).expand_as(index_nk)
            table_ev.index_put_((index_nk, token_nk), torch.ones_like(token_nk), accumulate=True)

        hooks.append(module.register_forward_pre_hook(count))
    model.eval()
    try:
        with deterministic(), torch.inference_mode():
            for row in sample:
                model(input_ids=row[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    routing = {
        layer: Routing(tokens=table_ev.sum(1).cpu().numpy(), distinct=(table_ev > 0).sum(1).cpu().numpy())
        for layer, table_ev in times.items()
    }
    return routing, sample.numel()


def choose(
    routing: Mapping[int, Routing],
    budget: BudgetConfig,
    *,
    rank: int,
    min_distinct: int,
    shapes: Mapping[str, tuple[int, int, int]],
) -> dict[int, tuple[int, ...]]:
    """Choose the experts with most routed tokens within a budget; of equal ones the lower layer and id.

    Args:
        routing: of the device's text.
        budget: experts per layer, or megabytes of fp32 factors in all.
        rank: of the adapters.
        min_distinct: distinct tokens below which an expert's factors never leave; such an expert is not chosen.
        shapes: (experts, d_out, d_in) of the model's fused expert parameters.

    Returns:
        Layer → ascending expert ids.

    Raises:
        DataError: no expert saw enough distinct tokens.
        ConfigError: not one expert fits the budget.
    """
    ranked = sorted(
        (-int(tokens), layer, expert)
        for layer, each in routing.items()
        for expert, tokens in enumerate(each.tokens)
        if each.distinct[expert] >= min_distinct
    )
    if not ranked:
        most = max(int(each.distinct.max()) for each in routing.values())
        raise DataError(
            f"no expert saw {min_distinct} distinct tokens of this device's text, the most is {most}: "
            "add text to data, or lower adapters.rank"
        )
    chosen: dict[int, list[int]] = {layer: [] for layer in sorted(routing)}
    left = int((budget.megabytes or 0) * 1_000_000)
    for _, layer, expert in ranked:
        if budget.experts is not None and len(chosen[layer]) < budget.experts:
            chosen[layer].append(expert)
        elif budget.megabytes is not None and (size := expert_bytes(layer, rank, shapes)) <= left:
            chosen[layer].append(expert)
            left -= size
    if not any(chosen.values()):
        smallest = min(expert_bytes(layer, rank, shapes) for layer in routing)
        raise ConfigError(
            f"adapters.budget.megabytes = {budget.megabytes} has no room for one expert of rank {rank}, which takes "
            f"{smallest / 1e6:.3g}: raise it, or lower adapters.rank"
        )
    return {layer: tuple(sorted(ids)) for layer, ids in chosen.items()}


def expert_bytes(layer: int, rank: int, shapes: Mapping[str, tuple[int, int, int]]) -> int:
    """Return the bytes of one expert's fp32 factors in a layer."""
    return sum(4 * rank * (d_out + d_in) for name, (_, d_out, d_in) in shapes.items() if expert_param(name)[0] == layer)


def most_adapted(adapters: AdaptersConfig, shapes: Mapping[str, tuple[int, int, int]]) -> dict[int, int]:
    """Return layer → how many experts are adapted at most, before a choice is made."""
    experts = {expert_param(name)[0]: shape[0] for name, shape in shapes.items()}
    if isinstance(adapters.experts, list):
        return dict.fromkeys(experts, len(set(adapters.experts)))
    if adapters.budget is None:
        return experts
    if adapters.budget.experts is not None:
        return {layer: min(n, adapters.budget.experts) for layer, n in experts.items()}
    left, most = int(adapters.budget.megabytes * 1_000_000), dict.fromkeys(experts, 0)
    for layer, n in experts.items():
        size = expert_bytes(layer, adapters.rank, shapes)
        most[layer] = min(n, left // size)
        left -= most[layer] * size
    return most


def choice_path(home: Path) -> Path:
    """Return where a device keeps its choice."""
    return home / "trainer" / "experts.json"


def kept_choice(
    path: Path,
    model: nn.Module,
    rows: np.ndarray,
    budget: BudgetConfig,
    *,
    rank: int,
    min_distinct: int,
    shapes: Mapping[str, tuple[int, int, int]],
    base_version: int,
    now: float,
    period_days: int | None = None,
) -> Choice:
    """Return the choice of the running period; the first call of a period makes it and writes it down.

    Args:
        path: of the choice.
        model: the snapshot that the device holds now.
        rows: the device's packed text.
        budget: as `choose`.
        rank: likewise.
        min_distinct: likewise.
        shapes: likewise.
        base_version: of the snapshot.
        now: seconds since the epoch.
        period_days: how long a choice stays; None: until its file is removed.

    Raises:
        ConfigError: the choice was made for another budget, rank or model.
        StorageError: the file cannot be read, was altered or cannot be written.
        DataError: no expert saw enough distinct tokens.
    """
    try:
        choice = Choice.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        choice = None
    except (OSError, ValidationError) as error:
        raise StorageError(f"choice of experts {path} is unusable ({type(error).__name__}): {_REMEDY}") from None
    over = choice is not None and period_days is not None and now >= choice.chosen_s + period_days * DAY_S
    if choice is not None and not over:
        _check(choice, path, budget, rank, shapes)
        return choice
    routing, sample_tokens = profile(model, rows)
    experts = choose(routing, budget, rank=rank, min_distinct=min_distinct, shapes=shapes)
    choice = Choice(
        chosen_s=int(now),
        base_version=base_version,
        sample_tokens=sample_tokens,
        rank=rank,
        budget=budget,
        experts={str(layer): list(ids) for layer, ids in experts.items()},
        tokens={str(layer): routing[layer].tokens[list(ids)].tolist() for layer, ids in experts.items()},
        distinct_tokens={str(layer): routing[layer].distinct[list(ids)].tolist() for layer, ids in experts.items()},
    )
    write_durable(path, canonical_json(choice.model_dump(mode="json")))
    return choice


def _check(
    choice: Choice, path: Path, budget: BudgetConfig, rank: int, shapes: Mapping[str, tuple[int, int, int]]
) -> None:
    if (choice.budget, choice.rank) != (budget, rank):
        raise ConfigError(
            f"choice of experts {path} was made at rank {choice.rank} for another adapters.budget or at another "
            f"adapters.rank than {rank}, and stays for its period: put them back, or {_REMEDY}"
        )
    numbers = {expert_param(name)[0]: shape[0] for name, shape in shapes.items()}
    for layer, ids in choice.layers().items():
        if layer not in numbers or max(ids) >= numbers[layer]:
            raise ConfigError(
                f"choice of experts {path} names expert {max(ids)} of layer {layer}, not of this model: {_REMEDY}"
            )

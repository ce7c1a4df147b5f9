"""A device's frozen experts, held quantised and never as a whole in fp32.

    W_e ≈ s·q      int8: q in −127..127, one s per output row      int4: q in −8..7, one s per output row and 64 inputs
    W_e ≈ q        bf16: q the nearest number of 8 bits and fp32's range

int8 is for devices in general (a quarter of the memory), int4 for those where memory is tight (a seventh, with an error
of weights that an adapter trained on it makes up for), bf16 for models that were published in it (half, and exact until
the first fold). NF4 is not offered: normal weights err by 9.2 % in it and by 9.5 % in this int4, and its table look-up
takes four times as long in plain torch. A forward pass de-quantises one expert at a time, only those
that got tokens, into one scratch matrix, and backward does it again: nothing in fp32 is kept between them. Plain torch,
so x86 and ARM alike. (transformers' own quantisation configs leave fused experts in full precision, without a word.)

Codes and scales are laid out input-major, so that both scaling and products run along contiguous output rows. An int4
byte holds the codes of inputs i and i + D/2 as two nibbles; shifted to the top they are 16·q, and s is stored as s/16.

Shape suffixes: S routed rows sorted by expert, D inputs, F outputs, E experts, G groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from fednested_lib.errors import ContractError
from fednested_lib.partition import group_of

Form = Literal["bf16", "int8", "int4"]
GROUP = 64  # inputs that share a scale in int4; the largest power of two below it where that does not divide D


class FrozenWeight(nn.Module):
    """One projection of a layer's experts; setting an item quantises that expert.

    Args:
        shape: (experts E, outputs F, inputs D) of the weight it stands for.
        form: ``bf16``, ``int8`` or ``int4``.

    Raises:
        ContractError: int4 with an odd number of inputs.
    """

    def __init__(self, shape: tuple[int, int, int], form: Form):
        super().__init__()
        n_experts, d_out, d_in = self.shape = torch.Size(shape)
        if form == "int4" and d_in % 2:
            raise ContractError(
                "unsupported_experts",
                f"int4 needs an even number of inputs, experts have {d_in}: set model.frozen: int8",
            )
        self.form = form
        groups = {"bf16": 0, "int8": 1, "int4": d_in // math.gcd(d_in, GROUP)}[form]
        rows, code = d_in // 2 if form == "int4" else d_in, torch.bfloat16 if form == "bf16" else torch.int8
        # Not persistent: a state dict holds masters, which these are not.
        self.register_buffer("codes", torch.zeros(n_experts, rows, d_out, dtype=code), persistent=False)
        self.register_buffer("scales", torch.zeros(n_experts, groups, 1, d_out), persistent=False)
        self.register_state_dict_pre_hook(_refuse)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    @property
    def size_bytes(self) -> int:
        """Resident bytes: codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __setitem__(self, expert: int, weight_fd: Tensor) -> None:
        if self.form == "bf16":
            self.codes[expert] = weight_fd.detach().t()
            return
        blocks = weight_fd.detach().t().to(self.scales).reshape(self.scales.shape[1], -1, self.shape[1])
        if self.form == "int8":
            scale = blocks.abs().amax(1, keepdim=True) / 127
        else:  # signed, so that the value of largest magnitude is −8 exactly
            scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
        codes = (blocks / scale.where(scale != 0, 1)).round_()
        codes = codes.clamp_(max=127 if self.form == "int8" else 7).to(torch.int8).view(-1, self.shape[1])
        if self.form == "int4":
            low, high = codes.chunk(2)
            codes, scale = (low & 15) | (high << 4), scale / 16
        self.codes[expert], self.scales[expert] = codes, scale

    def dequantise(self, expert: int, out_df: Tensor | None = None) -> Tensor:
        """Return the transposed weight [D, F] of one expert, in `out_df` if given."""
        _, d_out, d_in = self.shape
        out_df = self._scratch() if out_df is None else out_df
        codes = self.codes[expert]
        if self.form == "int4":
            out_df[: d_in // 2].copy_(codes << 4)
            out_df[d_in // 2 :].copy_(codes & -16)
        else:
            out_df.copy_(codes)
        if self.form == "bf16":
            return out_df
        out_df.view(-1, d_in // self.scales.shape[1], d_out).mul_(self.scales[expert])
        return out_df

    def project(self, x_sd: Tensor, offsets_e: Tensor) -> Tensor:
        """Return x·W_eᵀ [S, F] for rows sorted by expert; `offsets_e` is where each expert's rows end."""
        out_sf, scratch_df = x_sd.new_empty(len(x_sd), self.shape[1]), self._scratch()
        for expert, rows in _routed(offsets_e):
            torch.mm(x_sd[rows], self.dequantise(expert, scratch_df), out=out_sf[rows])
        return out_sf

    def project_back(self, grad_sf: Tensor, offsets_e: Tensor) -> Tensor:
        """Return grad·W_e [S, D], likewise."""
        out_sd, scratch_df = grad_sf.new_empty(len(grad_sf), self.shape[2]), self._scratch()
        for expert, rows in _routed(offsets_e):
            torch.mm(grad_sf[rows], self.dequantise(expert, scratch_df).t(), out=out_sd[rows])
        return out_sd

    def _scratch(self) -> Tensor:
        return self.scales.new_empty(self.shape[2], self.shape[1])


def _routed(offsets_e: Tensor) -> Iterator[tuple[int, slice]]:
    for expert, (start, stop) in enumerate(pairwise([0, *offsets_e.tolist()])):
        if start < stop:
            yield expert, slice(start, stop)


def project(x_sd: Tensor, weight: Tensor | FrozenWeight, offsets_e: Tensor) -> Tensor:
    """Return x·W_eᵀ [S, F] for rows sorted by expert, of a weight [E, F, D] in fp32 or quantised."""
    if isinstance(weight, FrozenWeight):
        return weight.project(x_sd, offsets_e)
    return grouped_mm(x_sd, weight.transpose(1, 2), offs=offsets_e)


def project_back(grad_sf: Tensor, weight: Tensor | FrozenWeight, offsets_e: Tensor) -> Tensor:
    """Return grad·W_e [S, D], likewise."""
    if isinstance(weight, FrozenWeight):
        return weight.project_back(grad_sf, offsets_e)
    return grouped_mm(grad_sf, weight, offs=offsets_e)


class _Projection(torch.autograd.Function):
    """x·W_eᵀ of a quantised weight, which is a constant."""

    @staticmethod
    def forward(ctx, x_sd, weight, offsets_e):
        ctx.constants = weight, offsets_e
        return weight.project(x_sd, offsets_e)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sf):
        weight, offsets_e = ctx.constants
        return weight.project_back(grad_sf, offsets_e), None, None


def quantised_experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run a quantised experts module that has no adapter (transformers' experts interface)."""
    expert_s, order_s = torch.sort(top_k_index.reshape(-1), stable=True)
    offsets_e = torch.bincount(expert_s, minlength=experts.num_experts).cumsum(0)
    token_s = order_s // top_k_index.shape[-1]
    x_nd = hidden_states.to(experts.gate_up_proj.dtype)
    up_sf = _Projection.apply(x_nd[token_s], experts.gate_up_proj, offsets_e)
    hidden_sf = experts._apply_gate(up_sf) * top_k_weights.reshape(-1, 1)[order_s].to(up_sf)
    out_sd = _Projection.apply(hidden_sf, experts.down_proj, offsets_e)
    return torch.zeros_like(x_nd).index_add(0, token_s, out_sd).to(hidden_states.dtype)


def quantise_experts(model: nn.Module, form: Form) -> None:
    """Replace a model's fp32 experts by quantised ones, one projection of a layer at a time; `attach` it afterwards.

    Raises:
        PartitionError: the model is of no known family.
    """
    family = model.config.model_type
    for name in [name for name, _ in model.named_parameters() if group_of(name, family) == "experts"]:
        weight = model.get_parameter(name)
        held = FrozenWeight(tuple(weight.shape), form)
        for expert in range(len(weight)):
            held[expert] = weight[expert]
        hold(model, {name: held})


def hold(model: nn.Module, weights: Mapping[str, FrozenWeight]) -> None:
    """Put quantised weights in the place of the parameters of these names, whose memory is let go."""
    for name, weight in weights.items():
        path, _, projection = name.rpartition(".")
        experts = model.get_submodule(path)
        delattr(experts, projection)
        setattr(experts, projection, weight)


def is_quantised(model: nn.Module) -> bool:
    """Tell whether any expert of a model is held quantised."""
    return any(isinstance(module, FrozenWeight) for module in model.modules())


def require_masters(model: nn.Module) -> None:
    """Refuse a model whose experts are quantised.

    Raises:
        ContractError: reason ``quantised_experts``.
    """
    for module in model.modules():
        if isinstance(module, FrozenWeight):
            _refuse(module)


def _refuse(held: FrozenWeight, *_: object) -> None:
    raise ContractError(
        "quantised_experts",
        f"experts are held as {held.form}, a merge and a snapshot need the fp32 masters: "
        "load the model with model.frozen: fp32",
    )

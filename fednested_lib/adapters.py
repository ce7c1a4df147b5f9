"""Low-rank adapters on fused experts, routed: low-rank work only for the tokens an adapted expert really got.

    W_e,eff = W_e + (α/r) · B_e·A_e          lora_a = A [r, d_in], lora_b = B [d_out, r]    (LoRA, arXiv 2106.09685)

The design paper writes W + A·Bᵀ: its A is our `lora_b`, its Bᵀ our `lora_a`. A starts uniform in ±1/√d_in from a
counter generator keyed by (seed, parameter, expert), B starts at zero, so a fresh adapter changes nothing. In mode
`fixed_a` A is the one of the spec's seed and stays it: only B is trained.

The forward pass is registered in transformers' experts interface as ``fednested_lora``; no model class is subclassed or
patched. It is one autograd node per layer that keeps its input, the up-projection and the rank-r activations, and makes
the rest again in backward. peft's `target_parameters` gives equal outputs and gradients (it is the test oracle) but
forms all E effective matrices and their full gradients.

Shape suffixes: N tokens, K top-k, S = N·K routed rows sorted by expert, M those of adapted experts, D model, F hidden,
E experts, n adapted experts, R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, fixed_factor
from fednested_lib.errors import ContractError
from fednested_lib.frozen import is_quantised, project, project_back, quantised_experts_forward, require_masters
from fednested_lib.partition import PROJECTIONS, expert_name, expert_param
from fednested_lib.router_bias import RouterBias

IMPLEMENTATION = "fednested_lora"
_SLOT = "_fednested"  # a plain attribute of the module: adapters must not appear in the model's state dict
_BIAS = "_fednested_bias"
_ALIGNMENT_BYTES = 16  # grouped_mm wants rows of a multiple of this


@dataclass(frozen=True)
class _Route:
    """Who goes where: rows sorted by expert."""

    token_s: Tensor
    inverse_s: Tensor
    offsets_e: Tensor
    rows_m: Tensor | None  # rows of adapted experts; None when all experts are adapted
    offsets_n: Tensor
    slot_m: Tensor  # position among the adapted experts, per adapted row

    def adapted(self, values_s: Tensor) -> Tensor:
        return values_s if self.rows_m is None else values_s[self.rows_m]


class _LayerAdapter:
    """Factors, routing and counters of one experts module."""

    def __init__(self, layer: int, experts: nn.Module, expert_ids: tuple[int, ...], spec: AdapterSpec, vocabulary: int):
        self.layer, self.expert_ids, self.spec = layer, expert_ids, spec
        weight = experts.down_proj
        # The rank is padded with zero vectors to the alignment of grouped_mm; their gradients are zero, so they stay.
        multiple = _ALIGNMENT_BYTES // weight.dtype.itemsize
        rank = -(-spec.rank // multiple) * multiple
        self.factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for projection in PROJECTIONS:
            _, d_out, d_in = getattr(experts, projection).shape
            # B is kept transposed: its gradient is then a product with long rows, up to four times faster.
            shapes = ((len(expert_ids), rank, d_in), (len(expert_ids), rank, d_out))
            lora_a, lora_b = (nn.Parameter(torch.zeros(shape, device=weight.device)) for shape in shapes)
            self.factors[projection] = (lora_a.requires_grad_(spec.mode != "fixed_a"), lora_b)
        self.slot_e = torch.full((experts.num_experts,), -1, device=weight.device)
        self.slot_e[list(expert_ids)] = torch.arange(len(expert_ids), device=weight.device)
        self.routed_n = torch.zeros(len(expert_ids), dtype=torch.int64, device=weight.device)
        self.seen_nv = torch.zeros(len(expert_ids), vocabulary, dtype=torch.bool, device=weight.device)

    def reset(self, seed: int) -> None:
        for projection, (lora_a, lora_b) in self.factors.items():
            with torch.no_grad():
                lora_a[:, : self.spec.rank] = torch.from_numpy(self._first_a(projection, lora_a.shape[2], seed))
                lora_b.zero_()
        self.routed_n.zero_()
        self.seen_nv.zero_()

    def _first_a(self, projection: str, d_in: int, seed: int) -> np.ndarray:
        name = expert_name(self.layer, projection)
        if self.spec.mode == "fixed_a":
            return fixed_factor(self.spec, name, self.expert_ids, d_in)
        return np.stack([_initial_a(seed, name, expert, self.spec.rank, d_in) for expert in self.expert_ids])

    def route(self, index_nk: Tensor) -> _Route:
        expert_s, order_s = torch.sort(index_nk.reshape(-1), stable=True)
        counts_e = torch.bincount(expert_s, minlength=len(self.slot_e))
        inverse_s = torch.empty_like(order_s)
        inverse_s[order_s] = torch.arange(len(order_s), device=order_s.device)
        slot_s = self.slot_e[expert_s]
        rows_m = None if len(self.expert_ids) == len(self.slot_e) else (slot_s >= 0).nonzero().squeeze(1)
        return _Route(
            token_s=order_s // index_nk.shape[-1],
            inverse_s=inverse_s,
            offsets_e=torch.cumsum(counts_e, 0, dtype=torch.int32),
            rows_m=rows_m,
            offsets_n=torch.cumsum(counts_e[self.slot_e >= 0], 0, dtype=torch.int32),
            slot_m=slot_s if rows_m is None else slot_s[rows_m],
        )

    def count(self, route: _Route, token_ids: Tensor | None) -> None:
        self.routed_n += torch.diff(route.offsets_n, prepend=route.offsets_n.new_zeros(1))
        if token_ids is not None:
            self.seen_nv[route.slot_m, token_ids[route.adapted(route.token_s)]] = True


def _initial_a(seed: int, name: str, expert: int, rank: int, d_in: int) -> np.ndarray:
    key = hashlib.sha256(f"{seed}/{name}/{expert}".encode()).digest()[:16]
    uniform = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big"))).random(
        (rank, d_in), dtype=np.float32
    )
    return (2 * uniform - 1) / np.float32(np.sqrt(d_in))


def _add_low_rank(out_sf: Tensor, x_sd: Tensor, a_nrd: Tensor, b_nrf: Tensor, route: _Route, scale: float) -> Tensor:
    """Add scale·B·A·x to the rows of adapted experts in place; returns A·x."""
    low_mr = grouped_mm(route.adapted(x_sd), a_nrd.transpose(1, 2), offs=route.offsets_n)
    high_mf = grouped_mm(low_mr, b_nrf, offs=route.offsets_n)
    if route.rows_m is None:
        out_sf.add_(high_mf, alpha=scale)
    else:
        out_sf.index_add_(0, route.rows_m, high_mf, alpha=scale)
    return low_mr


def _low_rank_gradients(
    grad_sf: Tensor, x_sd: Tensor, low_mr: Tensor, trains_a: bool, b_nrf: Tensor, route: _Route, scale: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of A, if it is trained, and B, and of A·x."""
    grad_mf = route.adapted(grad_sf)
    grad_low_mr = grouped_mm(grad_mf, b_nrf.transpose(1, 2), offs=route.offsets_n).mul_(scale)
    grad_b = grouped_mm(low_mr.t(), grad_mf, offs=route.offsets_n).mul_(scale)
    grad_a = grouped_mm(grad_low_mr.t(), route.adapted(x_sd), offs=route.offsets_n) if trains_a else None
    return grad_a, grad_b, grad_low_mr


def _add_input_gradient(grad_x_sd: Tensor, grad_low_mr: Tensor, a_nrd: Tensor, route: _Route) -> None:
    grad_x_md = grouped_mm(grad_low_mr, a_nrd, offs=route.offsets_n)
    if route.rows_m is None:
        grad_x_sd.add_(grad_x_md)
    else:
        grad_x_sd.index_add_(0, route.rows_m, grad_x_md)


class _RoutedExperts(torch.autograd.Function):
    """Σ_k w_k · down_e(gate(up_e(x))) with low-rank terms on both projections; the base weights are constants."""

    @staticmethod
    def forward(ctx, x_nd, weight_nk, up_a, up_b, down_a, down_b, experts, route, scale):
        x_sd = x_nd[route.token_s]
        up_sf = project(x_sd, experts.gate_up_proj, route.offsets_e)
        up_low = _add_low_rank(up_sf, x_sd, up_a, up_b, route, scale)
        # Weighting before the down-projection saves keeping its output for the router's gradient.
        hidden_sf = experts._apply_gate(up_sf) * _sorted(weight_nk, route)
        out_sd = project(hidden_sf, experts.down_proj, route.offsets_e)
        down_low = _add_low_rank(out_sd, hidden_sf, down_a, down_b, route, scale)
        ctx.save_for_backward(x_nd, weight_nk, up_a, up_b, down_a, down_b, up_sf, up_low, down_low)
        ctx.constants = experts, route, scale
        return _unsorted(out_sd, route, weight_nk.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nd):
        x_nd, weight_nk, up_a, up_b, down_a, down_b, up_sf, up_low, down_low = ctx.saved_tensors
        experts, route, scale = ctx.constants
        weight_s1, grad_sd = _sorted(weight_nk, route), grad_nd[route.token_s]
        with torch.enable_grad():
            up_sf = up_sf.detach().requires_grad_()
            gated_sf = experts._apply_gate(up_sf)

        grad_down_a, grad_down_b, grad_low = _low_rank_gradients(
            grad_sd, gated_sf.detach() * weight_s1, down_low, ctx.needs_input_grad[4], down_b, route, scale
        )
        grad_hidden_sf = project_back(grad_sd, experts.down_proj, route.offsets_e)
        _add_input_gradient(grad_hidden_sf, grad_low, down_a, route)
        (grad_up_sf,) = torch.autograd.grad(gated_sf, up_sf, grad_hidden_sf * weight_s1)

        grad_up_a, grad_up_b, grad_low = _low_rank_gradients(
            grad_up_sf, x_nd[route.token_s], up_low, ctx.needs_input_grad[2], up_b, route, scale
        )
        grad_x_nd = grad_weight_nk = None
        if ctx.needs_input_grad[0]:
            grad_x_sd = project_back(grad_up_sf, experts.gate_up_proj, route.offsets_e)
            _add_input_gradient(grad_x_sd, grad_low, up_a, route)
            grad_x_nd = _unsorted(grad_x_sd, route, weight_nk.shape)
        if ctx.needs_input_grad[1]:
            grad_weight_nk = (grad_hidden_sf * gated_sf.detach()).sum(1)[route.inverse_s].view_as(weight_nk)
        return grad_x_nd, grad_weight_nk, grad_up_a, grad_up_b, grad_down_a, grad_down_b, None, None, None


def _sorted(weight_nk: Tensor, route: _Route) -> Tensor:
    weight_s1 = torch.empty_like(weight_nk.reshape(-1, 1))
    weight_s1[route.inverse_s] = weight_nk.reshape(-1, 1)
    return weight_s1


def _unsorted(values_sd: Tensor, route: _Route, shape_nk: torch.Size) -> Tensor:
    return values_sd[route.inverse_s].view(*shape_nk, -1).sum(1)


def routed_experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run an experts module, with its adapter if one is attached (transformers' experts interface)."""
    slot = experts.__dict__.get(_SLOT)
    if slot is None:
        plain = quantised_experts_forward if is_quantised(experts) else grouped_mm_experts_forward
        return plain(experts, hidden_states, top_k_index, top_k_weights)
    adapter, feed = slot
    dtype = experts.gate_up_proj.dtype
    route = adapter.route(top_k_index)
    if torch.is_grad_enabled():  # evaluation is not training: it must not raise the counts that the export floor reads
        adapter.count(route, feed.token_ids_of(len(hidden_states)))
    factors = [factor.to(dtype) for projection in PROJECTIONS for factor in adapter.factors[projection]]
    out = _RoutedExperts.apply(
        hidden_states.to(dtype), top_k_weights.to(dtype), *factors, experts, route, adapter.spec.scale
    )
    return out.to(hidden_states.dtype)


def register() -> None:
    """Make ``fednested_lora`` known to transformers; repeating it is harmless."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts_forward)


class _TokenFeed:
    """The token ids of the running forward pass, which experts modules never see."""

    def __init__(self) -> None:
        self.token_ids: Tensor | None = None

    def hook(self, _model: nn.Module, args: tuple, kwargs: dict) -> None:
        token_ids = kwargs.get("input_ids", args[0] if args else None)
        self.token_ids = None if token_ids is None else token_ids.reshape(-1)

    def token_ids_of(self, n_tokens: int) -> Tensor | None:
        return self.token_ids if self.token_ids is not None and len(self.token_ids) == n_tokens else None


class RoutedAdapters:
    """The adapters of one model: parameters to train, counters, and the delta they make."""

    def __init__(self, spec: AdapterSpec, layers: list[_LayerAdapter], router_bias: RouterBias | None = None):
        self.spec, self.router_bias = spec, router_bias
        self._layers = layers
        self.expert_ids: dict[int, tuple[int, ...]] = {adapter.layer: adapter.expert_ids for adapter in layers}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained: A and Bᵀ or Bᵀ alone, [n, R, ·], R padded with zeros to a multiple of four; biases."""
        for adapter in self._layers:
            for projection in PROJECTIONS:
                yield from (factor for factor in adapter.factors[projection] if factor.requires_grad)
        if self.router_bias is not None:
            yield from self.router_bias.bias.values()

    @property
    def tokens(self) -> dict[int, list[int]]:
        """Routed tokens per layer, in the order of `expert_ids`, since the last reset (training only)."""
        return {adapter.layer: adapter.routed_n.tolist() for adapter in self._layers}

    @property
    def distinct_tokens(self) -> dict[int, list[int]]:
        """Distinct vocabulary entries per layer, likewise; zero when the model was run on embeddings."""
        return {adapter.layer: adapter.seen_nv.sum(1).tolist() for adapter in self._layers}

    def reset(self, seed: int) -> None:
        """Start again from B = 0 and A of this seed (of the spec's in mode `fixed_a`); counters too, biases not."""
        for adapter in self._layers:
            adapter.reset(seed)

    def state(self) -> dict[str, Tensor]:
        """Return what training changes, by name: factors and counters, the tensors themselves."""
        state = {}
        for adapter in self._layers:
            state |= {f"{adapter.layer}.routed": adapter.routed_n, f"{adapter.layer}.seen": adapter.seen_nv}
            for projection, factors in adapter.factors.items():
                for name, factor in zip("ab", factors, strict=True):
                    state[f"{adapter.layer}.{projection}.{name}"] = factor.data
        if self.router_bias is not None:
            state |= {f"{layer}.router": bias.data for layer, bias in self.router_bias.bias.items()}
        return state

    def to_delta(self) -> Delta:
        """Return what was learnt since the last reset (B started at zero, so it is local − snapshot)."""
        rank = self.spec.rank
        factors = {}
        for adapter in self._layers:
            for projection, (lora_a, lora_b) in adapter.factors.items():
                factors[expert_name(adapter.layer, projection)] = ExpertFactors(
                    expert_ids=adapter.expert_ids,
                    lora_a=np.ascontiguousarray(lora_a.detach().cpu().numpy()[:, :rank]),
                    lora_b=np.ascontiguousarray(lora_b.detach().cpu().numpy()[:, :rank].transpose(0, 2, 1)),
                )
        return Delta(spec=self.spec, factors=factors)


def experts_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Return layer → experts module, in the order of the layers.

    Raises:
        ContractError: the model has no fused experts.
    """
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts") and hasattr(module, "gate_up_proj"):
            found[expert_param(f"{name}.gate_up_proj")[0]] = module
    if not found:
        raise ContractError(
            "no_experts", f"{type(model).__name__} has no fused experts: use a Mixtral, Qwen3-MoE or OLMoE model"
        )
    return found


def _check_layout(layer: int, experts: nn.Module) -> None:
    wanted = {
        "is_concatenated": True,
        "is_transposed": False,
        "has_bias": False,
        "has_gate": True,
        "has_post_expert_norm": False,
    }
    for flag, value in wanted.items():
        if getattr(experts, flag, None) is not value:
            raise ContractError(
                "unsupported_experts",
                f"experts of layer {layer} have {flag} = {getattr(experts, flag, None)}, need {value}: "
                "use a Mixtral, Qwen3-MoE or OLMoE model",
            )
    for projection in PROJECTIONS:
        weight = getattr(experts, projection)
        if weight.shape[2] * weight.dtype.itemsize % _ALIGNMENT_BYTES:
            raise ContractError(
                "unsupported_experts",
                f"{projection} of layer {layer} has {weight.shape[2]} inputs of {weight.dtype.itemsize} bytes, "
                f"needs a multiple of {_ALIGNMENT_BYTES} bytes: choose another hidden size",
            )


def _check_ids(layer: int, ids: tuple[int, ...], n_experts: int) -> tuple[int, ...]:
    if list(ids) != sorted(set(ids)) or (ids and not 0 <= ids[0] <= ids[-1] < n_experts):
        raise ContractError(
            "bad_expert_ids",
            f"expert ids of layer {layer} must be ascending in 0..{n_experts - 1}, got {list(ids)[:8]}: "
            "set adapters.experts",
        )
    return tuple(ids)


def attach(
    model: nn.Module,
    spec: AdapterSpec,
    expert_ids: Mapping[int, tuple[int, ...]] | None,
    seed: int,
    *,
    router_bias: bool = False,
) -> RoutedAdapters:
    """Freeze a model and put fresh adapters on its experts.

    Args:
        model: transformers MoE model with fused experts, in fp32 or quantised (see `frozen`).
        spec: rank and alpha.
        expert_ids: layer → ascending expert ids; None adapts every expert of every layer.
        seed: of the initial A.
        router_bias: also train a bias per expert of every router, which is no part of the delta.

    Returns:
        The adapters; `detach(model)` takes them off again.

    Raises:
        ContractError: the experts have another layout, or an id does not exist.
    """
    modules = experts_modules(model)
    wanted = (
        {layer: tuple(range(module.num_experts)) for layer, module in modules.items()}
        if expert_ids is None
        else dict(expert_ids)
    )
    unknown = set(wanted) - set(modules)
    if unknown or not any(wanted.values()):
        raise ContractError(
            "bad_expert_ids", f"layers with experts are {sorted(modules)}, got {sorted(wanted)}: set adapters.experts"
        )
    detach(model)
    register()
    feed, layers = _TokenFeed(), []
    for layer in sorted(layer for layer, ids in wanted.items() if ids):
        _check_layout(layer, modules[layer])
        ids = _check_ids(layer, wanted[layer], modules[layer].num_experts)
        layers.append(_LayerAdapter(layer, modules[layer], ids, spec, model.config.vocab_size))
        modules[layer].__dict__[_SLOT] = (layers[-1], feed)
    model.requires_grad_(False)
    model.__dict__[_SLOT] = model.register_forward_pre_hook(feed.hook, with_kwargs=True)
    model.set_experts_implementation(IMPLEMENTATION)
    bias = RouterBias(model) if router_bias else None
    model.__dict__[_BIAS] = bias
    adapters = RoutedAdapters(spec, layers, bias)
    adapters.reset(seed)
    return adapters


def detach(model: nn.Module) -> None:
    """Take adapters off; the model computes as before but stays frozen. Without adapters this does nothing."""
    hook = model.__dict__.pop(_SLOT, None)
    if hook is None:
        return
    hook.remove()
    bias = model.__dict__.pop(_BIAS, None)
    if bias is not None:
        bias.detach()
    for module in experts_modules(model).values():
        module.__dict__.pop(_SLOT, None)
    if not is_quantised(model):  # those run here alone
        model.set_experts_implementation("grouped_mm")


def merge(model: nn.Module, delta: Delta) -> None:
    """Add a delta to the experts of a model in place: W_e ← W_e + (α/r)·B_e·A_e.

    Raises:
        ContractError: the experts are quantised.
    """
    require_masters(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, factors in delta.factors.items():
            for expert, lora_a, lora_b in zip(factors.expert_ids, factors.lora_a, factors.lora_b, strict=True):
                weight = parameters[name][expert]
                product = torch.from_numpy(lora_b) @ torch.from_numpy(lora_a)
                weight.add_(product.to(weight), alpha=delta.spec.scale)

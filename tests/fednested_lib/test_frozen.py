"""Quantised experts compute what fp32 experts of the de-quantised weights compute, at their own size."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch

from fednested_lib import frozen
from fednested_lib.adapters import attach, detach, merge
from fednested_lib.blobs import BlobStore
from fednested_lib.delta import AdapterSpec
from fednested_lib.errors import ContractError
from fednested_lib.frozen import FrozenWeight, quantise_experts, require_masters
from fednested_lib.snapshot import SnapshotManifest, build_model, describe_config, write_state_dict
from fednested_lib.training import train_adapters
from tests.peft_oracle import PeftTwin, factors_of

SPEC = AdapterSpec(rank=3, alpha=5.0)
IDS = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(1))
FORMS = ["bf16", "int8", "int4"]


def _held(form, shape=(3, 40, 128), seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    held = FrozenWeight(shape, form)
    for expert in range(len(weight)):
        held[expert] = weight[expert]
    return weight, held


def _dense(held):
    return torch.stack([held.dequantise(expert).t() for expert in range(held.shape[0])])


def _dequantised(model):
    """The same model with fp32 experts of the values that a quantised one stands for."""
    oracle = copy.deepcopy(model)
    for name, module in list(oracle.named_modules()):
        if isinstance(module, FrozenWeight):
            path, _, projection = name.rpartition(".")
            experts = oracle.get_submodule(path)
            delattr(experts, projection)
            setattr(experts, projection, torch.nn.Parameter(_dense(module), requires_grad=False))
    return oracle


def _adapted(model, ids):
    adapters = attach(model, SPEC, ids, seed=7)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter[:, : SPEC.rank] = torch.randn(parameter[:, : SPEC.rank].shape, generator=generator) * 0.2
    return adapters


def _close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("form", "relative", "step"), [("bf16", 0.002, 2**-8), ("int8", 0.008, 0.5 / 127), ("int4", 0.1, 1 / 8)]
)
def test_round_trip_error(form, relative, step):
    """Normal weights come back to 0.2 % (bf16), 0.8 % (int8, of 128 inputs) and 10 % (int4), to within a step."""
    weight, held = _held(form)
    error = _dense(held) - weight
    assert error.norm() <= relative * weight.norm()
    group = 64 if form == "int4" else 128
    largest = weight.view(3, 40, -1, group).abs().amax(-1, keepdim=True)
    assert (error.view(3, 40, -1, group).abs() <= largest * step * (1 + 1e-5)).all()


@pytest.mark.parametrize("form", FORMS)
def test_representable_weights_come_back_exactly(form):
    """Multiples of a power of two within the code's range, rows and groups of zeros included, are not changed."""
    low, top = (-8, 7) if form == "int4" else (-127, 127)
    weight = torch.randint(low, top + 1, (5, 192), generator=torch.Generator().manual_seed(3)) * 0.25
    weight[:, ::64] = low * 0.25  # the largest of every group
    weight[2], weight[3, 64:128] = 0, 0
    held = FrozenWeight((1, 5, 192), form)
    held[0] = weight
    assert torch.equal(held.dequantise(0).t(), weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("subset", [None, (1, 4, 5), (2,)])
def test_equals_fp32_experts_of_the_dequantised_weights(make_model, family, form, subset):
    """Logits and every gradient of A and B are those of a model with the de-quantised weights in fp32, to 1e-5."""
    model = make_model(family)
    quantise_experts(model, form)
    oracle = _dequantised(model)
    ids = subset and dict.fromkeys([0, 2], subset)  # layer 1 is without adapters, or dense
    results = []
    for each in (model, oracle):
        adapters = _adapted(each, ids)
        logits = each(input_ids=IDS).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        results.append([logits.detach(), *(parameter.grad for parameter in adapters.parameters())])
    for ours, theirs in zip(*results, strict=True):
        _close(ours, theirs)


@pytest.mark.parametrize(("core", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_bf16_experts_equal_pefts_on_the_bf16_model(make_model, family, core, tolerance):
    """Of a model whose weights are bf16, logits and gradients are peft's: as fp32 computes them, or as bf16 does."""
    model = make_model(family).bfloat16().to(core)
    oracle = copy.deepcopy(model)
    quantise_experts(model, "bf16")
    adapters = _adapted(model, None)
    peft = PeftTwin(oracle, adapters)
    results = []
    for each in (model, peft.model):
        logits = each(input_ids=IDS).logits.float()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        results.append(logits.detach())
    pairs = [results]
    for name, factors in factors_of(adapters).items():
        pairs += zip((each.grad[:, : SPEC.rank] for each in factors), peft.gradients(name), strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_without_adapters(make_model, family):
    """A quantised model computes, and passes gradients to its inputs, before attaching and after detaching."""
    model = make_model(family)
    quantise_experts(model, "int8")
    oracle = _dequantised(model)
    attach(model, SPEC, None, seed=7)
    detach(model)
    grads = []
    for each in (model, oracle):
        embeddings = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=embeddings).logits.square().mean().backward()
        grads.append(embeddings.grad)
    _close(*grads)


def test_half_precision_core(make_model):
    """Quantised experts compute in fp32 under a bf16 core, in layers with and without adapters."""
    model = make_model("mixtral").bfloat16()
    quantise_experts(model, "int8")
    adapters = _adapted(model, {1: (0, 3)})
    logits = model(input_ids=IDS).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in adapters.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_dequantises_routed_experts_once_each_way(form, monkeypatch):
    """Forward and backward each de-quantise the experts that got rows, one at a time into one matrix, and no other."""
    _, held = _held(form, (6, 8, 64))
    seen, places = [], set()
    original = FrozenWeight.dequantise

    def spy(self, expert, out_df=None):
        seen.append(expert)
        places.add(out_df.data_ptr())
        return original(self, expert, out_df)

    monkeypatch.setattr(FrozenWeight, "dequantise", spy)
    x = torch.randn(5, 64, requires_grad=True)
    offsets = torch.tensor([0, 2, 2, 2, 5, 5])  # experts 1 and 4
    frozen._Projection.apply(x, held, offsets).sum().backward()
    assert seen == [1, 4, 1, 4]
    assert len(places) <= 2


@pytest.mark.parametrize(("form", "ratio"), [("bf16", 2), ("int8", 3.9), ("int4", 7.1)])
def test_resident_size(form, ratio):
    """At a hidden size of 512 experts take at most 1/2 (bf16), 1/3.9 (int8) and 1/7.1 (int4) of fp32, all in all."""
    weight, held = _held(form, (2, 512, 512))
    stored = sum(buffer.untyped_storage().nbytes() for buffer in held.buffers())
    assert stored == held.size_bytes <= weight.nbytes / ratio
    assert not list(held.parameters())


def test_keeps_no_fp32_copy(make_model, monkeypatch):
    """What is de-quantised is gone when the forward pass and the backward pass are over."""
    model = make_model("mixtral")
    quantise_experts(model, "int4")
    adapters = attach(model, SPEC, None, seed=7)
    made = []
    original = FrozenWeight._scratch

    def spy(self):
        scratch = original(self)
        made.append(weakref.ref(scratch.untyped_storage()))
        return scratch

    monkeypatch.setattr(FrozenWeight, "_scratch", spy)
    loss = model(input_ids=IDS).logits.square().mean()
    gc.collect()
    assert len(made) == 3 * 2
    assert not any(each() for each in made)
    loss.backward()
    torch.optim.AdamW(adapters.parameters()).step()
    gc.collect()
    assert len(made) == 3 * 4 - 1  # the first layer's input needs no gradient
    assert not any(each() for each in made)


def _published(model, family, store):
    return SnapshotManifest(
        version=0,
        family=family,
        model_config=describe_config(model.config),
        tokenizer="0" * 64,
        blobs=write_state_dict(model.state_dict(), family, store),
    )


@pytest.mark.parametrize("form", FORMS)
def test_loads_quantised_expert_by_expert(make_model, family, form, tmp_path, monkeypatch):
    """A snapshot loaded quantised equals one quantised after loading, and one expert is in fp32 at a time."""
    store, model = BlobStore(tmp_path), make_model(family)
    manifest = _published(model, family, store)
    read, alive = [], []
    original = FrozenWeight.__setitem__

    def spy(self, expert, weight):
        storage = weight.untyped_storage()
        assert storage.nbytes() == weight.nbytes  # no part of a larger tensor
        read.append(weakref.ref(storage))
        alive.append(sum(each() is not None for each in read))
        original(self, expert, weight)

    with monkeypatch.context() as patched:
        patched.setattr(FrozenWeight, "__setitem__", spy)
        loaded = build_model(manifest, store, experts="fednested_lora", frozen=form)
    assert len(alive) == sum("/" in key for key in manifest.blobs if "experts" in key)
    assert max(alive) <= 2  # this one, and the one before until its name is bound anew
    quantise_experts(model, form)
    attach(model, SPEC, None, seed=0)
    detach(model)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not any("experts" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize("form", FORMS)
def test_is_no_master(make_model, form):
    """Merging into quantised experts, and writing them as a snapshot, is refused with the form and the remedy."""
    model = make_model("olmoe")
    require_masters(model)
    quantise_experts(model, form)
    delta = attach(model, SPEC, None, seed=7).to_delta()
    for refused in (lambda: merge(model, delta), model.state_dict, lambda: require_masters(model)):
        with pytest.raises(ContractError, match=f"held as {form}.*model.frozen: fp32") as error:
            refused()
        assert error.value.reason == "quantised_experts"


def test_odd_widths_are_refused():
    """Two codes to a byte need an even number of inputs; the message names the other form."""
    with pytest.raises(ContractError, match="have 33: set model.frozen: int8"):
        FrozenWeight((1, 8, 33), "int4")


@pytest.mark.parametrize("form", FORMS)
def test_trains_and_repeats_to_the_bit(make_model, form):
    """Adapters on quantised experts learn, and the same seed gives the same bytes."""
    rows = np.tile(np.arange(17, dtype=np.int32), (8, 1))
    deltas = []
    for _ in range(2):
        model = make_model("mixtral")
        quantise_experts(model, form)
        adapters = attach(model, SPEC, None, seed=7)
        report = train_adapters(model, adapters, rows, steps=8, batch_size=2, learning_rate=1e-2, seed=1)
        assert report.loss_last < 0.8 * report.loss_first
        deltas.append(adapters.to_delta())
    for name, factors in deltas[0].factors.items():
        assert factors.lora_b.tobytes() == deltas[1].factors[name].lora_b.tobytes()

"""The routed adapters compute what peft computes, for any subset of experts, and count what they saw."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fednested_lib.adapters import attach, detach, merge
from fednested_lib.delta import AdapterSpec, fixed_factor
from fednested_lib.errors import ContractError
from tests.peft_oracle import PeftTwin, factors_of

SPEC = AdapterSpec(rank=3, alpha=5.0)
IDS = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(1))


def _randomise_b(adapters, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, lora_b in factors_of(adapters).values():
            lora_b[:, : SPEC.rank] = torch.randn(lora_b[:, : SPEC.rank].shape, generator=generator) * 0.2


def _loss(model):
    logits = model(input_ids=IDS).logits
    return logits, torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def _close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("subset", [None, (1, 4, 5), (2,)])
def test_equals_peft(make_model, family, subset):
    """Logits and every gradient of A and B equal peft's to 1e-5, for all experts and for subsets."""
    model = make_model(family)
    oracle = copy.deepcopy(model)
    sparse = [0, 2] if family == "qwen3_moe" else [0, 1, 2]
    adapters = attach(model, SPEC, subset and dict.fromkeys(sparse, subset), seed=7)
    _randomise_b(adapters)
    peft = PeftTwin(oracle, adapters)

    logits, loss = _loss(model)
    expected, expected_loss = _loss(peft.model)
    loss.backward()
    expected_loss.backward()

    _close(logits, expected)
    for name, (lora_a, lora_b) in factors_of(adapters).items():
        grad_a, grad_b = peft.gradients(name)
        _close(lora_a.grad[:, : SPEC.rank], grad_a)
        _close(lora_b.grad[:, : SPEC.rank], grad_b)


def test_gradient_to_inputs_and_router(make_model, family):
    """The node's gradients to hidden states and routing weights equal those of plain autograd over merged weights."""
    model = make_model(family)
    adapters = attach(model, SPEC, None, seed=7)
    _randomise_b(adapters)
    merged = make_model(family)
    merge(merged, adapters.to_delta())
    grads = []
    for each in (model, merged):
        embeddings = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=embeddings).logits.square().mean().backward()
        grads.append(embeddings.grad)
    _close(*grads)


def test_fresh_adapter_changes_nothing(make_model, family):
    """B = 0 gives the snapshot's logits, attached, detached and merged."""
    model = make_model(family)
    before = model(input_ids=IDS).logits
    adapters = attach(model, SPEC, None, seed=7)
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)
    detach(model)
    assert torch.equal(model(input_ids=IDS).logits, before)
    merge(model, adapters.to_delta())
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_merge_equals_attached(make_model, family):
    """Adding the delta to the weights gives what the attached adapter computes; other experts stay bit-identical."""
    model = make_model(family)
    untouched = copy.deepcopy(model.state_dict())
    adapters = attach(model, SPEC, {0: (0, 3), 2: (5,)}, seed=7)
    _randomise_b(adapters)
    expected = model(input_ids=IDS).logits.detach()
    detach(model)
    merge(model, adapters.to_delta())
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    for name, tensor in model.state_dict().items():
        touched = {0: [0, 3], 2: [5]}.get(int(name.split(".")[2]), []) if ".experts." in name else []
        same = [i for i in range(len(tensor)) if i not in touched]
        assert torch.equal(tensor[same], untouched[name][same])


def test_counts_training_tokens_only(make_model):
    """Routed and distinct tokens per adapted expert equal the router's choices; evaluation does not count."""
    model = make_model("mixtral")
    adapters = attach(model, SPEC, {0: (1, 4)}, seed=7)
    with torch.no_grad():
        model(input_ids=IDS)
    assert adapters.tokens == {0: [0, 0]}
    chosen = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2]))
    model(input_ids=IDS)
    hits = [[IDS.reshape(-1)[i].item() for i in range(IDS.numel()) if expert in chosen[0][i]] for expert in (1, 4)]
    assert adapters.tokens == {0: [len(h) for h in hits]}
    assert adapters.distinct_tokens == {0: [len(set(h)) for h in hits]}
    adapters.reset(seed=7)
    assert adapters.tokens == adapters.distinct_tokens == {0: [0, 0]}


def test_unknown_token_ids_count_as_zero(make_model):
    """A model run on embeddings has no distinct count, so nothing passes an export floor."""
    model = make_model("mixtral")
    adapters = attach(model, SPEC, None, seed=7)
    model(inputs_embeds=model.get_input_embeddings()(IDS))
    assert sum(map(sum, adapters.tokens.values())) == 3 * 2 * IDS.numel()
    assert sum(map(sum, adapters.distinct_tokens.values())) == 0


def test_seeded_start(make_model):
    """The initial A depends on (seed, parameter, expert) alone, so a subset starts where the full set does."""
    full = attach(make_model("olmoe"), SPEC, None, seed=7).to_delta()
    part = attach(make_model("olmoe"), SPEC, {1: (2, 5)}, seed=7).to_delta()
    other = attach(make_model("olmoe"), SPEC, {1: (2, 5)}, seed=8).to_delta()
    name = "model.layers.1.mlp.experts.down_proj"
    assert np.array_equal(part.factors[name].lora_a, full.factors[name].lora_a[[2, 5]])
    assert not np.array_equal(part.factors[name].lora_a, other.factors[name].lora_a)
    starts = {factors.lora_a[j].tobytes() for factors in full.factors.values() for j in range(6)}
    assert len(starts) == 3 * 2 * 6
    bound = 1 / np.sqrt(48)
    assert 0.9 * bound < np.abs(full.factors[name].lora_a).max() <= bound
    assert part.factors[name].lora_a.shape == (2, 3, 48)
    assert part.factors[name].lora_b.shape == (2, 32, 3)


def test_fixed_a_trains_b_alone(make_model, family):
    """In mode fixed_a B gets the gradient that it gets beside a trained A, and A is its seed's before and after."""
    spec = AdapterSpec(rank=3, alpha=5.0, mode="fixed_a", seed=f"{7:032x}")
    model = make_model(family)
    fixed = attach(model, spec, {2: (2, 5)}, seed=1)
    start = factors_of(fixed)
    trained = list(fixed.parameters())
    assert [id(b) for _, b in start.values()] == [id(each) for each in trained]
    _randomise_b(fixed)
    _loss(model)[1].backward()
    beside = make_model(family)
    free = factors_of(attach(beside, SPEC, {2: (2, 5)}, seed=1))
    with torch.no_grad():
        for name, (lora_a, lora_b) in free.items():
            lora_a.copy_(start[name][0])
            lora_b.copy_(start[name][1])
    _loss(beside)[1].backward()
    for name, (lora_a, lora_b) in start.items():
        assert lora_a.grad is None
        assert torch.equal(lora_b.grad, free[name][1].grad)
        assert free[name][0].grad.any()
        assert np.array_equal(fixed.to_delta().factors[name].lora_a, fixed_factor(spec, name, (2, 5), lora_a.shape[2]))


def test_stays_out_of_the_state_dict(make_model):
    """Adapters never leak into the weights that a snapshot is made of, and the base is frozen."""
    model = make_model("mixtral")
    before = set(model.state_dict())
    attach(model, SPEC, None, seed=7)
    assert set(model.state_dict()) == before
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_padding_stays_zero(make_model):
    """The zero vectors that pad the rank to the kernel's alignment get no gradient and never move."""
    model = make_model("mixtral")
    adapters = attach(model, SPEC, None, seed=7)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        _loss(model)[1].backward()
        optimizer.step()
    for lora_a, lora_b in factors_of(adapters).values():
        assert lora_a.shape[1] == 4
        assert not lora_a[:, 3:].any()
        assert not lora_b[:, 3:].any()
        assert lora_b[:, :3].any()


@pytest.mark.parametrize("ids", [{0: (6,)}, {0: (2, 1)}, {9: (0,)}, {}, {0: ()}])
def test_refuses_unknown_experts(make_model, ids):
    """Experts or layers that the model does not have are refused by name, with the setting to change."""
    with pytest.raises(ContractError, match="adapters.experts"):
        attach(make_model("mixtral"), SPEC, ids, seed=0)


def test_refuses_other_layouts():
    """gpt-oss stores transposed, interleaved experts with biases: a clear refusal instead of wrong numbers."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_local_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, eos_token_id=0,
    )  # fmt: skip
    with pytest.raises(ContractError, match="experts of layer 0 have is_"):
        attach(AutoModelForCausalLM.from_config(config), SPEC, None, seed=0)

"""The routers' biases train on the device, help it, and are in nothing that leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fednested_lib.adapters import attach, detach
from fednested_lib.delta import AdapterSpec
from fednested_lib.errors import StorageError
from fednested_lib.router_bias import keep_bias, load_bias
from fednested_lib.training import mean_loss, train_adapters

SPEC = AdapterSpec(rank=2, alpha=4.0)
TOKENS = torch.randint(0, 96, (2, 13), generator=torch.Generator().manual_seed(1))


def _text(seed: int, n_rows: int = 24) -> np.ndarray:
    """Rows that step through a cycle of twelve tokens, from anywhere in it."""
    starts = np.random.default_rng(seed).integers(0, 12, (n_rows, 1))
    return (7 * ((starts + np.arange(17)) % 12) + 3).astype(np.int32)


def _logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_a_bias_of_zero_changes_nothing(make_model, family):
    """Fresh biases leave every logit bit by bit, and so does taking them off after they were moved."""
    model = make_model(family)
    attach(model, SPEC, None, seed=0)
    before = _logits(model)
    adapters = attach(model, SPEC, None, seed=0, router_bias=True)
    assert torch.equal(_logits(model), before)
    n_layers = 2 if family == "qwen3_moe" else 3
    assert [len(each) for each in adapters.router_bias.values().values()] == [6] * n_layers
    adapters.router_bias.load({0: [3.0, -3.0, 0.0, 1.0, 0.0, -1.0]})
    assert not torch.equal(_logits(model), before)
    detach(model)
    attach(model, SPEC, None, seed=0)
    assert torch.equal(_logits(model), before)


def test_a_bias_routes(make_model, family):
    """An expert with a large bias gets every token, one with a large negative bias none."""
    model = make_model(family)
    adapters = attach(model, SPEC, None, seed=0, router_bias=True)
    adapters.router_bias.load({0: [100.0, -100.0, 0.0, 0.0, 0.0, 0.0]})
    model(input_ids=TOKENS)
    assert adapters.tokens[0][0] == TOKENS.numel()
    assert adapters.tokens[0][1] == 0


def test_biases_alone_lower_the_heldout_loss(make_model):
    """With the factors left as they start, training the biases helps on text of the same kind that was not seen."""
    model = make_model("mixtral")
    adapters = attach(model, SPEC, None, seed=0, router_bias=True)
    before = mean_loss(model, _text(1))[0]
    biases = list(adapters.router_bias.bias.values())
    optimizer = torch.optim.Adam(biases, lr=0.05)
    rows = torch.from_numpy(_text(0).astype(np.int64))
    for _ in range(30):
        optimizer.zero_grad()
        logits = model(input_ids=rows[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
    after = mean_loss(model, _text(1))[0]
    assert not any(factors.lora_b.any() for factors in adapters.to_delta().factors.values())
    assert after < before - 0.02


def test_training_moves_the_biases_and_the_delta_has_none(make_model, family):
    """They are among what is trained; the delta has the names and shapes that it has without them."""
    model = make_model(family)
    plain = attach(model, SPEC, None, seed=0)
    names = {name: factors.lora_b.shape for name, factors in plain.to_delta().factors.items()}
    adapters = attach(model, SPEC, None, seed=0, router_bias=True)
    train_adapters(model, adapters, _text(0), steps=3, batch_size=4, learning_rate=1e-2, seed=0)
    assert all(any(each) for each in adapters.router_bias.values().values())
    assert {name: factors.lora_b.shape for name, factors in adapters.to_delta().factors.items()} == names


def test_a_bias_goes_on_within_a_base(tmp_path):
    """The next update starts from where the last one ended, one made again from where it did, a new base from none."""
    path, first, second = tmp_path / "bias.json", {0: [0.5, -0.25]}, {0: [0.75, -1.0]}
    assert load_bias(path, "a" * 64, 0) == {}
    keep_bias(path, "a" * 64, 4, before=first, after=second)
    assert load_bias(path, "a" * 64, 5) == second
    assert load_bias(path, "a" * 64, 4) == first
    assert load_bias(path, "a" * 64, 3) == {}
    assert load_bias(path, "b" * 64, 5) == {}
    assert set(json.loads(path.read_bytes())) == {"base_digest", "sequence", "before", "after"}
    path.write_text("{}")
    with pytest.raises(StorageError, match="remove it"):
        load_bias(path, "a" * 64, 5)

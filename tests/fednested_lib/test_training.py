"""Local training learns, is deterministic to the bit, and stops at a loss that is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fednested_lib.adapters import attach
from fednested_lib.delta import AdapterSpec
from fednested_lib.errors import TrainingError
from fednested_lib.training import _batches, deterministic, mean_loss, train_adapters

SPEC = AdapterSpec(rank=4, alpha=8.0)
ROWS = np.random.default_rng(0).integers(0, 96, (10, 13)).astype(np.int32)
HOW = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "seed": 5}


def test_loss_goes_down(make_model, family):
    """A few steps lower the loss on the device's own rows, by the adapters alone."""
    model = make_model(family)
    adapters = attach(model, SPEC, None, seed=1)
    before, n = mean_loss(model, ROWS)
    seen = []
    report = train_adapters(model, adapters, ROWS, **{**HOW, "steps": 30}, on_step=lambda step, loss: seen.append(step))
    after, _ = mean_loss(model, ROWS)
    assert n == 120
    assert after < before - 0.3
    assert report.loss_last < report.loss_first
    assert (report.tokens, report.examples, seen) == (30 * 4 * 12, 10, list(range(30)))


def test_two_runs_are_equal_to_the_bit(make_model):
    """The same snapshot, rows and seed give the same factors, whatever threads or random state the caller has."""
    factors = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(threads)
        model = make_model("mixtral", seed=3)
        torch.set_num_threads(threads)
        adapters = attach(model, SPEC, None, seed=1)
        train_adapters(model, adapters, ROWS, **HOW)
        assert torch.get_num_threads() == threads
        factors.append(adapters.to_delta().factors)
    torch.set_num_threads(1)
    for name, first in factors[0].items():
        assert first.lora_a.tobytes() == factors[1][name].lora_a.tobytes()
        assert first.lora_b.tobytes() == factors[1][name].lora_b.tobytes()
        assert first.lora_b.any()


def test_reset_forgets(make_model):
    """After a reset the same training gives the same delta: nothing of the sent one is left."""
    model = make_model("mixtral")
    adapters = attach(model, SPEC, None, seed=1)
    train_adapters(model, adapters, ROWS, **HOW)
    first, tokens = adapters.to_delta(), adapters.tokens
    adapters.reset(seed=1)
    assert not any(factors.lora_b.any() for factors in adapters.to_delta().factors.values())
    train_adapters(model, adapters, ROWS, **HOW)
    assert adapters.tokens == tokens
    for name, factors in adapters.to_delta().factors.items():
        assert np.array_equal(factors.lora_b, first.factors[name].lora_b)


def test_mean_loss_is_per_token_whatever_the_batch(make_model):
    """The loss is Σ nats / Σ tokens, so an uneven last batch does not count more."""
    model = make_model("mixtral")
    losses = [mean_loss(model, ROWS, batch_size)[0] for batch_size in (1, 3, 4, 10, 64)]
    assert max(losses) - min(losses) < 1e-6
    assert mean_loss(model, ROWS, 3) == mean_loss(model, ROWS, 3)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ROWS[:, :-1].astype(np.int64))).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(ROWS[:, 1:].astype(np.int64)).flatten()
    )
    assert losses[0] == pytest.approx(expected.item(), rel=1e-6)


def test_epochs_use_every_row_once():
    """Rows come in random order, each once before any comes again, whatever the batch size."""
    order = np.concatenate(list(_batches(10, 4, 5, seed=2)))
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert not np.array_equal(order[:10], order[10:20])
    assert not np.array_equal(order[:10], np.concatenate(list(_batches(10, 4, 5, seed=3)))[:10])


def test_nan_stops(make_model):
    """A loss that is not finite ends training and evaluation with the step and the remedy."""
    model = make_model("mixtral")
    adapters = attach(model, SPEC, None, seed=1)
    with pytest.raises(TrainingError, match=r"loss of step \d of 6 is nan.*learning_rate"):
        train_adapters(model, adapters, ROWS, **{**HOW, "learning_rate": 1e30})
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="is nan, must be finite"):
        mean_loss(model, ROWS)


def test_deterministic_restores_the_settings():
    """The caller's thread count and strictness are back afterwards, also after an error."""

    def fail():
        with deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError

    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 9])
def test_micro_batches_give_the_full_batch(make_model, micro):
    """Gradients summed over parts, uneven ones included, train what the full batch trains, to fp32 rounding."""
    model = make_model("mixtral")
    adapters = attach(model, SPEC, None, seed=1)
    how = {**HOW, "batch_size": 4, "steps": 3}
    report = train_adapters(model, adapters, ROWS, **how)
    whole, tokens, distinct = adapters.to_delta(), adapters.tokens, adapters.distinct_tokens
    adapters.reset(seed=1)
    parts = train_adapters(model, adapters, ROWS, **how, micro_batch_size=micro)
    assert parts.loss_last == pytest.approx(report.loss_last, rel=1e-5)
    assert (adapters.tokens, adapters.distinct_tokens) == (tokens, distinct)
    for name, factors in adapters.to_delta().factors.items():
        expected = whole.factors[name].lora_b
        assert np.abs(factors.lora_b - expected).max() <= 1e-3 * np.abs(expected).max()
        assert (micro < 4) == (not np.array_equal(factors.lora_b, expected))

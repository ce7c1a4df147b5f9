from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fednested_lib.errors import DataError, PartitionError, TrainingError
from tier1.training.backends import TorchBackend, parameter_groups
from tier1.training.deepspeed_backend import DeepSpeedBackend
from tier1.training.deepspeed_config import DeepSpeedSettings
from tier1.training.lora import LoraBackend
from tier1.training.lora_settings import LoraSettings
from tier1.training.loss import balancing_loss
from tier1.training.meter import active_parameters
from tier1.training.model import initial_model
from tier1.training.settings import TrainSettings
from tier1.training.trainer import batches, dense_delta, train

ROWS = np.random.default_rng(0).integers(0, 20, size=(24, 17)).astype(np.int32)


def settings(**changes):
    return TrainSettings(**{"steps": 6, "batch_size": 4, "learning_rate": 1e-2, **changes})


def trained(config, **changes):
    model = initial_model("mixtral", config, 0)
    report = train(model, ROWS, settings(**changes), family="mixtral")
    return model.state_dict(), report


def test_loss_falls(small_mixtral):
    """Guards that training learns: 20 of 300 tokens occur, which is worth ln 300 − ln 20 nats."""
    _, report = trained(small_mixtral, steps=60)
    assert report.loss_first == pytest.approx(math.log(300), abs=0.2)
    assert report.loss_last < math.log(20) + 0.2
    assert (report.steps, report.tokens) == (60, 60 * 4 * 16)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_are_equal_to_the_bit(small_mixtral, threads):
    """Guards that a training run is a function of its arguments on one numeric profile."""
    runs = [trained(small_mixtral, threads=threads, steps=3) for _ in range(2)]
    (one, report_one), (two, report_two) = runs
    assert report_one == report_two
    assert all(torch.equal(one[name], two[name]) for name in one)
    other, _ = trained(small_mixtral, threads=threads, steps=3, seed=1)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_the_callers_torch_settings_are_restored(small_mixtral):
    """Guards that a training run inside a service leaves no thread count or determinism flag behind."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    trained(small_mixtral, steps=1, threads=2 if before[0] == 1 else 1)
    assert before == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())


def test_each_group_has_its_own_rate(small_mixtral):
    """Guards the paper's three rates: a group at rate 0 stays bit-identical while the others move."""
    before = initial_model("mixtral", small_mixtral, 0).state_dict()
    after, _ = trained(small_mixtral, expert_learning_rate=0.0, router_learning_rate=0.0)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".mlp." not in name}


def test_norms_do_not_decay(small_mixtral):
    """Guards that weight decay pulls matrices towards zero and leaves norm gains alone."""
    model = initial_model("mixtral", small_mixtral, 0)
    groups = parameter_groups(model, settings(weight_decay=0.5), "mixtral")
    assert all((group["weight_decay"] == 0.5) == (p.dim() > 1) for group in groups for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_the_router_loss_balances_the_experts(small_mixtral):
    """Guards that the auxiliary loss reaches the router: with it the router's weights end elsewhere."""
    with_aux, _ = trained(small_mixtral, aux_loss=1.0)
    without, _ = trained(small_mixtral, aux_loss=0.0)
    name = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(with_aux[name], without[name])


def test_the_router_loss_is_that_of_transformers_layer_by_layer():
    """Guards our own sum, which several ranks need, against the reference, gradient included."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [torch.randn(40, 4, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
    ours, theirs = [[layer.clone().requires_grad_() for layer in layers] for _ in range(2)]
    loss, layer_by_layer = balancing_loss(tuple(ours), 2), [load_balancing_loss_func((each,), 4, 2) for each in theirs]
    reference = sum(layer_by_layer) / 3
    loss.backward()
    reference.backward()
    assert torch.allclose(loss, reference, rtol=1e-6)
    assert all(torch.allclose(one.grad, other.grad, rtol=1e-5) for one, other in zip(ours, theirs, strict=True))


def test_an_expert_that_is_dead_in_one_layer_is_not_made_up_for_in_another():
    """Guards against experts that stay dead: two layers that each starve what the other favours are not balanced."""
    first = torch.tensor([4.0, 0.0]).expand(8, 2)
    even = torch.tensor([[4.0, 0.0], [0.0, 4.0]]).repeat(4, 1)
    assert balancing_loss((even, even), 1) == pytest.approx(1.0)
    assert balancing_loss((first, first.flip(1)), 1) > 1.9


def test_a_bad_loss_stops_the_run_and_keeps_the_last_good_weights(small_mixtral):
    """Guards that a NaN at step 3 names the step and the remedy and leaves the weights of step 2."""

    class Poisoned(TorchBackend):
        n_steps = 0

        def step(self, rows, rate):
            self.n_steps += 1
            if self.n_steps == 3:
                self._model.model.norm.register_forward_hook(lambda module, args, output: output * math.nan)
            return super().step(rows, rate)

    kept: list[dict] = []
    model = initial_model("mixtral", small_mixtral, 0)
    keep = lambda step, loss: kept.append({name: t.clone() for name, t in model.state_dict().items()})  # noqa: E731
    with pytest.raises(TrainingError, match=r"step 3 of 6 is not finite.*lower core\.learning_rate and .* there is no"):
        train(model, ROWS, settings(), family="mixtral", backend=Poisoned(), on_step=keep)
    assert len(kept) == 2
    assert all(torch.equal(kept[-1][name], tensor) for name, tensor in model.state_dict().items())


def test_every_row_is_used_before_any_is_used_again():
    """Guards the data order: epochs without replacement, across batch boundaries."""
    seen = [int(row) for batch in batches(10, settings(steps=5, batch_size=4)) for row in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_no_rows_are_refused(small_mixtral):
    """Guards against a run on nothing."""
    with pytest.raises(DataError, match="got 0"):
        train(initial_model("mixtral", small_mixtral, 0), ROWS[:0], settings(), family="mixtral")


def test_a_delta_is_local_minus_base(small_mixtral):
    """Guards the sign: base plus delta is the trained model, and no parameter escapes the partition rule."""
    before = {name: tensor.clone() for name, tensor in initial_model("mixtral", small_mixtral, 0).state_dict().items()}
    after, _ = trained(small_mixtral)
    delta = dense_delta(before, after, "mixtral")
    assert all(torch.allclose(before[name] + delta[name], after[name], atol=1e-6) for name in before)
    with pytest.raises(PartitionError):
        dense_delta({"odd": before["lm_head.weight"]}, {"odd": before["lm_head.weight"]}, "mixtral")


def test_a_schedule_over_two_runs_is_one_run(small_mixtral):
    """Guards that a run goes on from moments, rate and rows of the one before: equal weights to the bit."""
    whole, _ = trained(small_mixtral)
    model, backend = initial_model("mixtral", small_mixtral, 0), TorchBackend()
    train(model, ROWS, settings(last_step=2), family="mixtral", backend=backend)
    state = {
        name: torch.zeros_like(t) if name.startswith("model.") else t for name, t in backend.training_state().items()
    }
    report = train(model, ROWS, settings(first_step=2, last_step=6), family="mixtral", moments=state)
    assert (report.steps, report.tokens) == (4, 4 * 4 * 16)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole.items())


def test_beyond_the_schedule_the_rate_stays(small_mixtral):
    """Guards that a run may go on after its schedule's end: rows go on, the rate stays at a tenth."""
    beyond = settings(first_step=6, last_step=9)
    assert [beyond.factor(step) for step in (6, 7, 9)] == pytest.approx([0.1] * 3)
    assert len(list(batches(len(ROWS), beyond))) == 9


def test_rows_of_another_tokenizer_are_refused(small_mixtral):
    """Guards against an index error deep in the model, on a GPU a dead context: the token and the bound are named."""
    rows = ROWS.copy()
    rows[-1, -1] = 300
    with pytest.raises(DataError, match="below the model's vocabulary of 300, got 300"):
        train(initial_model("mixtral", small_mixtral, 0), rows, settings(), family="mixtral")


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_too_little_memory_names_the_micro_batch_to_try(small_mixtral, raised):
    """Guards item 7's row: the message says what to set, and any other error of torch stays what it is."""

    class Large(TorchBackend):
        def step(self, rows, rate):
            raise raised

    model = initial_model("mixtral", small_mixtral, 0)
    with pytest.raises(TrainingError, match=r"step 1 with 4 rows per pass: set core\.micro_batch to 2"):
        train(model, ROWS, settings(), family="mixtral", backend=Large())
    with pytest.raises(TrainingError, match=r"1 rows per pass: cut weights and optimiser with core\.deepspeed"):
        train(model, ROWS, settings(micro_batch=1), family="mixtral", backend=Large())
    raised = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(model, ROWS, settings(), family="mixtral", backend=Large())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_too_little_memory_before_the_first_step_is_told_too(small_mixtral, error):
    """Guards the move to the GPU and the start of an engine, where a smaller micro-batch would not help."""

    class Large(TorchBackend):
        def prepare(self, *args):
            raise error

    model = initial_model("mixtral", small_mixtral, 0)
    with pytest.raises(TrainingError, match=r"not suffice before the first step: cut weights .* core\.deepspeed"):
        train(model, ROWS, settings(), family="mixtral", backend=Large())


def test_the_remedy_for_memory_is_one_that_goes_with_the_run():
    """Guards against advice that the configuration refuses: low rank and DeepSpeed do not go together."""
    lora, sharded = (lambda **s: LoraBackend(LoraSettings(**s))), (lambda **s: DeepSpeedBackend(DeepSpeedSettings(**s)))
    assert lora().memory_remedy.startswith("set core.lora.quantize to int4")
    assert lora(quantize="int4").memory_remedy == "lower core.lora.rank or name fewer core.lora.targets"
    assert sharded(zero_stage=1).memory_remedy == (
        "raise core.deepspeed.zero_stage (now 1), set core.deepspeed.offload to true"
    )
    assert sharded(zero_stage=3, offload=True).memory_remedy == "train on GPUs with more memory"


def test_an_allocation_that_the_cpu_refuses_is_too_little_memory(small_mixtral):
    """Guards the CPU's error, which has no class of its own: its wording is torch's, read from a real one."""

    class Huge(TorchBackend):
        def step(self, rows, rate):
            return float(torch.empty(1 << 60)[0])

    with pytest.raises(TrainingError, match=r"does not suffice for step 1 .* core\.micro_batch to 2"):
        train(initial_model("mixtral", small_mixtral, 0), ROWS, settings(), family="mixtral", backend=Huge())


def test_the_parameters_that_a_token_meets(small_mixtral):
    """Guards the MFU: half of the four experts are met with top-2, all of the rest."""
    model = initial_model("mixtral", small_mixtral, 0)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert active_parameters(model, "mixtral") == model.num_parameters() - experts / 2

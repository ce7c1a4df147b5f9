"""Safeguards against forgetting: their mathematics, what stays to the bit, and exact resume with each of them."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from tier1.training.backends import TorchBackend
from tier1.training.checkpoint import Checkpoints
from tier1.training.loss import batch_loss
from tier1.training.model import initial_model
from tier1.training.pace import Frequencies, Pace, entry_periods
from tier1.training.safeguarded import SafeguardedBackend
from tier1.training.safeguards import (
    Consolidation,
    Distillation,
    Ewc,
    Freeze,
    Memory,
    Rehearsal,
    Rehearsed,
    Replay,
    Safeguards,
    divergence,
    fisher_diagonal,
    periods_of,
    routed_shares,
    terms_of,
)
from tier1.training.settings import TrainSettings
from tier1.training.trainer import train

ROWS = np.random.default_rng(0).integers(0, 20, size=(24, 17)).astype(np.int32)
OLD = np.random.default_rng(1).integers(100, 140, size=(12, 17)).astype(np.int32)
BATCH = torch.from_numpy(ROWS[:4].astype(np.int64))
RANDOM = {"attention_dropout": 0.2, "router_jitter_noise": 0.05}
REHEARSED = Rehearsed(weight=0.7, rows=3)
EXPERTS = "model.layers.1.mlp.experts.down_proj"


class Bigram(nn.Module):
    """log p(x_t | x_{t−1}) = log softmax(table[x_{t−1}])[x_t]: a model whose Fisher information is known."""

    def __init__(self, vocab: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(3)))

    def forward(self, input_ids, use_cache=False):
        return MoeCausalLMOutputWithPast(logits=self.table[input_ids])


@pytest.fixture
def base(small_mixtral):
    return initial_model("mixtral", small_mixtral, 0)


@pytest.fixture(scope="module")
def memory():
    """Old rows, and a Fisher information that is not the same everywhere."""
    from tests.tier1.training.conftest import SMALL_MIXTRAL

    model = initial_model("mixtral", SMALL_MIXTRAL, 0)
    return Memory(rows=OLD, fisher=fisher_diagonal(model, OLD))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(config, safeguards=None, memory=None, checkpoints=None, on_step=None, **changes):
    model = initial_model("mixtral", config, 0)
    run = TrainSettings(**{"steps": 8, "batch_size": 4, "learning_rate": 1e-2, **changes})
    backend = TorchBackend() if safeguards is None else SafeguardedBackend(safeguards, memory)
    train(model, ROWS, run, family="mixtral", backend=backend, checkpoints=checkpoints, on_step=on_step)
    return model.state_dict()


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_spring_of_ewc_is_at_rest_at_the_base(base, memory):
    """Guards that EWC neither adds to the loss of the base nor pulls at it, and does both everywhere else."""
    term = Consolidation(3.0, memory.fisher, base)
    penalty = term(base, BATCH, None)
    penalty.backward()
    assert penalty.item() == 0
    assert all(not p.grad.any() for p in base.parameters())
    with torch.no_grad():
        base.lm_head.weight += 0.5
    expected = 3.0 / 2 * 0.25 * memory.fisher["lm_head.weight"].sum()
    assert term(base, BATCH, None).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_fisher_is_that_of_a_model_whose_fisher_is_known():
    """Guards the Fisher against the closed form of a bigram: per row, (Σ_t onehot(x_t) − p)² / T, averaged."""
    model, rows = Bigram(6), np.random.default_rng(2).integers(0, 6, size=(5, 9))
    probabilities = model.table.detach().softmax(-1).numpy()
    expected = np.zeros((6, 6))
    for row in rows:
        score = np.zeros((6, 6))
        for before, after in zip(row[:-1], row[1:], strict=True):
            score[before] += np.eye(6)[after] - probabilities[before]
        expected += score**2 / 8 / 5
    np.testing.assert_allclose(fisher_diagonal(model, rows)["table"].numpy(), expected, rtol=1e-4, atol=1e-7)


def test_the_fisher_of_text_that_the_model_itself_writes_is_the_curvature_of_its_loss():
    """Guards the scale per token: for x from the model, F is the expected Hessian's diagonal, p·(1 − p) · P(before)."""
    model, rng = Bigram(3), np.random.default_rng(4)
    probabilities = model.table.detach().softmax(-1).double().numpy()
    probabilities /= probabilities.sum(-1, keepdims=True)
    rows = np.zeros((1500, 9), np.int64)
    rows[:, 0] = rng.integers(0, 3, size=1500)
    for column in range(1, 9):
        rows[:, column] = [rng.choice(3, p=probabilities[before]) for before in rows[:, column - 1]]
    visits = np.bincount(rows[:, :-1].ravel(), minlength=3) / rows[:, :-1].size
    expected = visits[:, None] * probabilities * (1 - probabilities)
    np.testing.assert_allclose(fisher_diagonal(model, rows)["table"].numpy(), expected, rtol=0.15)


def test_the_fisher_leaves_the_model_as_it_was(base):
    """Guards that taking the Fisher information neither moves a weight nor leaves a gradient or another mode behind."""
    before = state_of(base.train())
    fisher = fisher_diagonal(base, OLD[:2])
    assert equal(before, base.state_dict())
    assert base.training
    assert all(p.grad is None for p in base.parameters())
    assert fisher.keys() == dict(base.named_parameters()).keys()
    assert all((f >= 0).all() for f in fisher.values())
    assert fisher["lm_head.weight"].any()


def test_the_divergence_is_zero_of_equals_and_that_of_torch_otherwise():
    """Guards KL(wanted ‖ found) per token, its direction included, against torch's own."""
    wanted, found = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).unbind()
    assert divergence(wanted, wanted).item() == 0
    reference = nn.functional.kl_div(
        found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence(wanted, found).item() == pytest.approx(reference.item(), rel=1e-5)
    assert divergence(wanted, found).item() != pytest.approx(divergence(found, wanted).item(), rel=1e-3)


def test_distillation_is_zero_at_the_base_and_not_elsewhere(base, memory):
    """Guards that the teacher is the base: nothing to learn from it there, and it does not move with the model."""
    term = Distillation(REHEARSED, memory.rows, base)
    assert term(base, BATCH, None).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        base.lm_head.weight.mul_(2)
    assert term(base, BATCH, None).item() > 1e-4


def test_replay_is_the_loss_of_old_rows(base):
    """Guards that replay takes the next-token loss of the old rows, not of the batch, times its weight."""
    one_row = np.repeat(OLD[:1], 5, axis=0)
    tokens = torch.from_numpy(OLD[:1].astype(np.int64))
    expected = nn.functional.cross_entropy(base(input_ids=tokens[:, :-1]).logits[0], tokens[0, 1:])
    found = Replay(REHEARSED, one_row)(base, BATCH, None)
    assert found.item() == pytest.approx(0.7 * expected.item(), rel=1e-5)


@pytest.mark.parametrize("n", [8, 3])
def test_old_rows_are_drawn_once_a_step_and_dealt_to_its_passes(base, n):
    """Guards cost and identity: micro-batches change neither which old rows a step sees nor what they weigh."""
    settings = replace(REHEARSED, rows=n)

    def of_a_step(passes):
        torch.manual_seed(5)
        drawn, terms = Rehearsal(OLD, n, 1, passes=passes), Replay(settings, OLD, passes=passes)
        parts = [drawn.draw() for _ in range(passes)]
        with torch.no_grad():
            loss = sum(terms(base, BATCH, None) for _ in range(passes)) / passes
        return torch.cat([part for part, _ in parts]), loss.item()

    rows, loss = of_a_step(1)
    assert len(rows) == n
    for passes in (2, 4, 8):
        again, same = of_a_step(passes)
        torch.testing.assert_close(again, rows)
        assert same == pytest.approx(loss, rel=1e-5)


def test_masked_documents_are_masked_in_old_rows_too(base):
    """Guards that a replayed row is read as the trainer reads its own: not beyond the beginning of a document."""
    end = int(OLD[0, 8])
    rows = np.stack([OLD[0], OLD[0]])
    rows[1, :8] = OLD[1, :8]  # another document before the same one
    tokens = torch.from_numpy(rows.astype(np.int64))[:, :-1]
    assert not (rows[:, :8] == end).any()

    def tail(end):
        wanted = []
        base.register_forward_hook(lambda module, args, output: wanted.append(output.logits[0, 8:].detach()))
        for row in rows:
            torch.manual_seed(0)
            Replay(REHEARSED, row[None], end=end)(base, tokens, None)
        return wanted[-2:]

    assert not torch.allclose(*tail(None))
    torch.testing.assert_close(*tail(end))


def test_a_composition_is_the_sum(base, memory):
    """Guards that several safeguards add: the loss with all is the plain loss plus each alone."""
    with torch.no_grad():
        teacher = copy.deepcopy(base)
        base.lm_head.weight.mul_(1.5)
    one_row = Memory(rows=memory.rows[:1], fisher=memory.fisher)  # what is drawn is the same each time
    run = TrainSettings(steps=1)

    def loss(**parts):
        terms = terms_of(Safeguards(**parts), one_row, teacher)
        return batch_loss(base, BATCH, run, terms=terms)[0].item(), len(terms)

    alone = [{"replay": REHEARSED}, {"distillation": REHEARSED}, {"ewc": Ewc(weight=2.0)}]
    (plain, n_plain), (composed, n_composed) = loss(), loss(**alone[0], **alone[1], **alone[2])
    assert (n_plain, n_composed) == (0, 3)
    added = [loss(**part)[0] - plain for part in alone]
    assert min(added) > 1e-5
    assert composed - plain == pytest.approx(sum(added), rel=1e-4)


def test_without_safeguards_or_at_frequency_one_it_is_the_plain_backend(small_mixtral, memory):
    """Guards that off is off, to the bit, and that a frequency of 1 is one step per step."""
    plain = trained(small_mixtral)
    assert equal(plain, trained(small_mixtral, Safeguards(), memory))
    assert equal(plain, trained(small_mixtral, Safeguards(frequencies=Frequencies(experts=(1, 1))), memory))
    assert equal(plain, trained(small_mixtral, Safeguards(ewc=Ewc(weight=9.0)), Memory())), "no Fisher yet"


def test_a_frozen_group_and_a_frozen_expert_keep_their_bits(small_mixtral, base, memory):
    """Guards freezing against weight decay and moments: every fourth expert and the router stay, all others move."""
    frozen = Safeguards(frequencies=Frequencies(router=None, experts=(1, None)))
    before, after = state_of(base), trained(small_mixtral, frozen, memory, weight_decay=0.5)
    assert torch.equal(before["model.layers.0.mlp.gate.weight"], after["model.layers.0.mlp.gate.weight"])
    for projection in ("gate_up_proj", "down_proj"):
        old, new = (state[f"model.layers.1.mlp.experts.{projection}"] for state in (before, after))
        assert [torch.equal(old[expert], new[expert]) for expert in range(4)] == [False, True, False, True]
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_the_experts_that_old_rows_need_are_frozen(small_mixtral, base, memory):
    """Guards selective freezing: which experts stay is decided by the old rows' share of tokens, layer by layer."""
    shares = routed_shares(base, OLD)
    assert shares.shape == (2, 4)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    bound = float(np.sort(shares.ravel())[-3])
    after = trained(small_mixtral, Safeguards(freeze=Freeze(share=bound)), memory)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        stayed = [torch.equal(base.state_dict()[name][expert], after[name][expert]) for expert in range(4)]
        assert stayed == list(shares[layer] >= bound)
    assert 3 <= (shares >= bound).sum() < 8


@pytest.mark.parametrize(("share", "level"), [(0.01, "info"), (0.99, "warning")])
def test_a_share_that_freezes_nobody_is_said(base, share, level):
    """Guards against a safeguard that is on and does nothing: of balanced experts none has a large share."""
    with capture_logs() as logs:
        periods_of(Safeguards(freeze=Freeze(share=share)), Memory(rows=OLD), base, "mixtral")
    (said,) = (entry for entry in logs if entry["event"] == "core.experts_frozen")
    shares = routed_shares(base, OLD)
    assert (said["log_level"], said["frozen"]) == (level, (shares >= share).sum())
    assert said["largest_share"] == pytest.approx(shares.max(), abs=5e-4)


def test_experts_are_frozen_where_other_layers_are_dense():
    """Guards the numbering: what is known of routing is of the layers that have experts, whichever these are."""
    config = {
        "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 1, "vocab_size": 160, "mlp_only_layers": [0],
    }  # fmt: skip
    model = initial_model("qwen3_moe", config, 0)
    shares = routed_shares(model, OLD)
    bound = float(np.median(shares))
    periods = periods_of(Safeguards(freeze=Freeze(share=bound)), Memory(rows=OLD), model, "qwen3_moe")
    assert shares.shape == (2, 4)
    for row, layer in enumerate((1, 2)):
        stays = [period is None for period in periods[f"model.layers.{layer}.mlp.experts.down_proj"]]
        assert stays == list(shares[row] >= bound)


def test_a_slow_group_moves_at_its_steps_by_the_mean_of_their_gradients(small_mixtral, memory):
    """Guards the frequency: a router of period 3 rests at steps 1, 2, 4, 5 and moves at 3 and 6; expert 1 likewise."""
    seen = []
    slow = Safeguards(frequencies=Frequencies(router=3, experts=(1, 3, None)))
    backend = SafeguardedBackend(slow, memory)
    model = initial_model("mixtral", small_mixtral, 0)
    names = ("model.layers.0.mlp.gate.weight", EXPERTS, "lm_head.weight")
    before = [state_of(model)]

    def on_step(step, loss):
        now = state_of(model)
        router, experts, head = (now[name] != before[0][name] for name in names)
        seen.append((bool(router.any()), *(bool(experts[expert].any()) for expert in range(4)), bool(head.any())))
        before[0] = now

    run = TrainSettings(steps=6, batch_size=4, learning_rate=1e-2)
    train(model, ROWS, run, family="mixtral", backend=backend, on_step=on_step)
    rests, moves = (False, True, False, False, True, True), (True, True, True, False, True, True)
    assert seen == [rests, rests, moves, rests, rests, moves]


def test_what_a_slow_group_takes_is_the_mean_of_the_collected_gradients(base):
    """Guards the collected gradient of a whole parameter and of one expert, and that it starts anew after a step."""
    slow = Safeguards(frequencies=Frequencies(router=2, experts=(2, 1)))
    parameters = dict(base.named_parameters())
    periods = periods_of(slow, Memory(rows=OLD), base, "mixtral")
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3, betas=(0.0, 0.0), eps=1e-9)
    router, experts = parameters["model.layers.0.mlp.gate.weight"], parameters[EXPERTS]
    taken, moments = [], []
    Pace({parameters[name]: entry_periods(period, parameters[name]) for name, period in periods.items()}).attach(
        optimizer
    )
    for value in (1.0, 3.0, 10.0, 20.0):
        for parameter in base.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step()
        seen = [optimizer.state[tensor]["exp_avg"] for tensor in (router, experts)]  # β = 0: the gradient that it took
        taken.append((seen[0].mean().item(), *seen[1].mean((1, 2)).tolist()))
        moments.append(seen[1][0].clone())
    assert not moments[0].any(), "a resting expert's moments rest"
    assert moments[1].any()
    assert torch.equal(moments[1], moments[2])
    assert taken[1] == pytest.approx((2.0, 2.0, 3.0, 2.0, 3.0))
    assert taken[3] == pytest.approx((15.0, 15.0, 20.0, 15.0, 20.0))
    assert [taken[0][0], taken[2][0]] == [0.0, taken[1][0]], "a resting router's too"


def test_a_slow_group_takes_the_steps_of_an_adamw_of_its_own(base):
    """Guards the correction of moments: at its steps a group of period 3 is where AdamW alone would be by then."""
    slow, alone = base, copy.deepcopy(base)
    name = "model.layers.0.mlp.gate.weight"
    one, other = dict(slow.named_parameters())[name], dict(alone.named_parameters())[name]
    optimizers = [torch.optim.AdamW([tensor], lr=1e-2, weight_decay=0.1) for tensor in (one, other)]
    Pace({one: entry_periods(3, one)}).attach(optimizers[0])
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 10):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone() if step % 3 == 1 else other.grad + one.grad
        optimizers[0].step()
        if step % 3 == 0:
            other.grad /= 3
            optimizers[1].step()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Stop(Exception):
    """Ends a run between two steps."""


EVERY = {
    "replay": Safeguards(replay=REHEARSED),
    "distillation": Safeguards(distillation=REHEARSED),
    "ewc": Safeguards(ewc=Ewc(weight=5.0)),
    "freeze": Safeguards(freeze=Freeze(share=0.26)),
    "frequencies": Safeguards(frequencies=Frequencies(core=2, router=5, experts=(1, 3, None, 4))),
    "all": Safeguards(
        replay=REHEARSED,
        distillation=REHEARSED,
        ewc=Ewc(weight=5.0),
        freeze=Freeze(share=0.26),
        frequencies=Frequencies(core=2, router=5, experts=(1, 3, None, 4)),
    ),
}


@pytest.mark.parametrize("safeguards", EVERY.values(), ids=EVERY)
def test_a_resumed_run_ends_with_the_bits_of_a_whole_one(small_mixtral, memory, tmp_path, safeguards):
    """Guards exact resume with each safeguard: drawn rows, collected gradients, resting experts and the base."""
    config = small_mixtral | RANDOM
    whole = trained(config, safeguards, memory)
    assert not equal(whole, trained(config)), "the safeguard does something"

    def stop(step, loss):
        if step == 7:
            raise Stop

    place = Checkpoints(directory=tmp_path / "run", every=4, run={})
    with pytest.raises(Stop):
        trained(config, safeguards, memory, place, stop)
    torch.manual_seed(99)
    assert place.newest().progress.step == 4
    assert equal(whole, trained(config, safeguards, memory, place))


def test_the_next_run_of_a_cluster_goes_on_where_the_last_one_stood(small_mixtral, memory):
    """Guards `core.schedule_steps`: what slow groups collected, and when they move, goes over from run to run."""
    chosen = Safeguards(replay=REHEARSED, frequencies=EVERY["frequencies"].frequencies)
    whole = trained(small_mixtral, chosen, memory, steps=12)
    model, first = initial_model("mixtral", small_mixtral, 0), SafeguardedBackend(chosen, memory)
    run = TrainSettings(steps=12, last_step=7, batch_size=4, learning_rate=1e-2)
    train(model, ROWS, run, family="mixtral", backend=first)
    state = {name: tensor.clone() for name, tensor in first.training_state().items()}
    assert any("collected" in name for name in state)
    later = replace(run, first_step=7, last_step=12)

    def goes_on(safeguards, moments):
        copied = copy.deepcopy(model)
        train(
            copied,
            ROWS,
            later,
            family="mixtral",
            backend=SafeguardedBackend(safeguards, memory),
            moments=moments,
        )
        return copied.state_dict()

    assert equal(whole, goes_on(chosen, state))
    without = {name: tensor for name, tensor in state.items() if "collected" not in name}
    assert not equal(whole, goes_on(chosen, without)), "safeguards that are switched on begin to collect"
    assert not equal(whole, goes_on(Safeguards(), state)), "and those that are switched off are off"


def test_slow_groups_begin_where_there_are_no_moments(small_mixtral, memory):
    """Guards a state with collected gradients alone: a parameter that has not moved yet has no moments."""
    model = initial_model("mixtral", small_mixtral, 0)
    backend = SafeguardedBackend(EVERY["frequencies"], memory)
    collected = {f"optimizer.collected.{name}": torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
    run = TrainSettings(steps=6, first_step=3, batch_size=4, learning_rate=1e-2)
    train(model, ROWS, run, family="mixtral", backend=backend, moments=collected)
    assert {float(backend.training_state()[f"optimizer.step.{name}"]) for name, _ in model.named_parameters()} == {3.0}


def test_replay_and_distillation_keep_what_training_on_other_text_forgets(small_mixtral):
    """Guards the purpose: what the base has learned is lost without, and kept with, replay or distillation."""
    from fednested_lib.training import mean_loss

    def after(safeguards):
        model = initial_model("mixtral", small_mixtral, 0)
        run = TrainSettings(steps=30, batch_size=6, learning_rate=1e-2)
        train(model, OLD, run, family="mixtral")
        learned = mean_loss(model, OLD)[0]
        train(model, ROWS, run, family="mixtral", backend=SafeguardedBackend(safeguards, Memory(rows=OLD)))
        return mean_loss(model, OLD)[0] - learned

    plain = after(Safeguards())
    assert plain > 1.0
    rehearsed = Rehearsed(weight=1.0, rows=6)
    assert after(Safeguards(replay=rehearsed)) < plain / 4
    assert after(Safeguards(distillation=rehearsed)) < plain / 4

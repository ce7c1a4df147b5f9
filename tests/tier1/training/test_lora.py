"""Low-rank training at tier 1, also of quantised weights: rank, learning, exact resumption, what it saves, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fednested_lib.errors import ConfigError, TrainingError
from fednested_lib.snapshot import decode_blob
from tests.federation import make_federation, make_workspace
from tier1.config import LoraConfig, load_tier1
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import settle_candidate
from tier1.loops.replay import replay_versions
from tier1.training.backends import TorchBackend
from tier1.training.checkpoint import Checkpoints
from tier1.training.lora import LoraBackend, attach
from tier1.training.lora_settings import LoraSettings
from tier1.training.model import initial_model
from tier1.training.settings import TrainSettings
from tier1.training.trainer import train

ROWS = np.random.default_rng(0).integers(0, 20, size=(24, 17)).astype(np.int32)
LORA = LoraSettings(rank=2, alpha=4.0)


class Stop(Exception):
    """Ends a run between two steps."""


def trained(config, *, steps=10, lora=LORA, checkpoints=None, stop_after=None, rate=3e-2):
    def on_step(step, loss):
        if step == stop_after:
            raise Stop

    backend = LoraBackend(lora)
    settings = TrainSettings(steps=steps, batch_size=4, learning_rate=rate)
    model = initial_model("mixtral", config, 0)
    report = train(model, ROWS, settings, family="mixtral", backend=backend, checkpoints=checkpoints, on_step=on_step)
    return backend, report


def ranks_of(delta):
    return {name: int(torch.linalg.matrix_rank(tensor.double(), rtol=1e-5).max()) for name, tensor in delta.items()}


def test_the_change_has_the_rank_that_was_asked_for(small_mixtral):
    """Guards that targets change by at most rank r, every expert by itself, and that nothing else moves a bit."""
    before = initial_model("mixtral", small_mixtral, 0).state_dict()
    backend, _ = trained(small_mixtral)
    after, delta = backend.state_dict(), backend.delta()
    assert set(ranks_of(delta).values()) == {2}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == delta.keys()
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in moved} == {*LORA.targets}
    assert all(torch.equal(before[name] + change, after[name]) for name, change in delta.items())


@pytest.mark.parametrize(("form", "error"), [("bf16", 0.005), ("int4", 0.15)])
def test_quantised_targets_are_what_the_model_computes_with(small_mixtral, form, error):
    """Guards that B = 0 leaves Q(W), near W, in each target, and that other weights keep their bits."""
    before = initial_model("mixtral", small_mixtral, 0).state_dict()
    backend = LoraBackend(replace(LORA, quantize=form))
    backend.prepare(initial_model("mixtral", small_mixtral, 0), TrainSettings(steps=1, batch_size=4), "mixtral")
    after, targets = backend.state_dict(), backend.delta().keys()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - targets)
    for name in targets:
        assert 0 < (after[name] - before[name]).norm() / before[name].norm() < error


@pytest.mark.parametrize("form", ["none", "int4"])
def test_a_quantised_weight_is_never_kept_whole(small_mixtral, form):
    """Guards the memory: autograd keeps no W_eff until backward, and no fp32 master is a tensor of the model."""
    backend, kept = LoraBackend(replace(LORA, quantize=form)), []
    model = initial_model("mixtral", small_mixtral, 0)
    whole = {tuple(weight.shape) for name, weight in model.named_parameters() if ".experts." in name}
    backend.prepare(model, TrainSettings(steps=1, batch_size=4), "mixtral")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        backend.step(torch.from_numpy(ROWS[:4]).long(), 1.0)
    held = {tuple(tensor.shape) for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    transposed = {(e, d, f) for e, f, d in whole}
    assert bool((whole | transposed) & {*kept}) is (form == "none")
    assert bool(whole & held) is (form == "none")


@pytest.mark.parametrize("form", ["none", "bf16", "int4"])
def test_a_base_learns_something_new(small_mixtral, form):
    """Guards that the factors learn: a model that counts in ones counts in threes, which at first it never expects."""
    lora = LoraSettings(rank=4, alpha=16.0, quantize=form)
    ones, threes = (((np.arange(24)[:, None] + k * np.arange(17)) % 20).astype(np.int32) for k in (1, 3))
    settings = TrainSettings(steps=60, batch_size=4, learning_rate=1e-2)
    model = initial_model("mixtral", small_mixtral, 0)
    train(model, ones, settings, family="mixtral")
    report = train(model, threes, settings, family="mixtral", backend=LoraBackend(lora))
    assert report.loss_first > 5
    assert report.loss_last < 0.5


def test_the_first_step_starts_from_the_base(small_mixtral):
    """Guards that B = 0: the loss of step 1 is, to the bit, that of training the weights themselves."""
    _, report = trained(small_mixtral, steps=1)
    settings, model = TrainSettings(steps=1, batch_size=4), initial_model("mixtral", small_mixtral, 0)
    assert report.loss_first == train(model, ROWS, settings, family="mixtral").loss_first


@pytest.mark.parametrize("form", ["none", "int4"])
def test_a_resumed_run_ends_with_the_bits_of_a_whole_one(small_mixtral, tmp_path, form):
    """Guards that factors and their moments are all that the next step depends on."""
    noisy, lora = small_mixtral | {"attention_dropout": 0.2}, replace(LORA, quantize=form)
    whole, report = trained(noisy, lora=lora)
    place = Checkpoints(directory=tmp_path / "run", every=4)
    with pytest.raises(Stop):
        trained(noisy, lora=lora, checkpoints=place, stop_after=6)
    resumed, again = trained(noisy, lora=lora, checkpoints=place)
    assert again == report
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_what_is_trained_in_place_of_the_weights_is_part_of_what_a_run_is(tmp_path, monkeypatch):
    """Guards resumption from a file: the run itself goes on where it was saved, other factors are refused by name."""
    lora = {"rank": 1, "targets": ["q_proj"]}
    fed = make_federation(tmp_path, core={"lora": {**lora, "quantize": "bf16"}, "steps": 6, "checkpoint_every": 2})
    packed, step = pack_datasets(fed, authorise_training(fed, "run")), LoraBackend.step
    taken = []

    def dying(self, rows, rate):
        taken.append(rows)
        if len(taken) == 4:
            raise Stop
        return step(self, rows, rate)

    monkeypatch.setattr(LoraBackend, "step", dying)
    with pytest.raises(Stop):
        train_delta(fed, packed, "run")
    core = fed.config.core.model_copy(update={"lora": LoraConfig(**lora)})
    with pytest.raises(TrainingError, match=r"""another run: its lora\.quantize is "bf16", this run's is "none\""""):
        train_delta(replace(fed, config=fed.config.model_copy(update={"core": core})), packed, "run")
    train_delta(fed, packed, "run")
    assert len(taken) == 4 + 6 - 2


def test_the_optimiser_keeps_the_factors_alone(small_mixtral):
    """Guards what it saves: moments of r · (d_in + d_out) numbers per matrix, and no gradient of a frozen weight."""
    backend, _ = trained(small_mixtral, steps=1)
    dense = TorchBackend()
    settings = TrainSettings(steps=1, batch_size=4)
    train(initial_model("mixtral", small_mixtral, 0), ROWS, settings, family="mixtral", backend=dense)
    factors = sum(2 * (x.shape[-1] + x.shape[-2]) * x.shape[:-2].numel() for x in backend.delta().values())
    assert moments(backend) == 2 * factors
    assert moments(backend) < 0.3 * moments(dense)
    assert all(parameter.grad is None for parameter in backend._model.parameters() if not parameter.requires_grad)


def moments(backend):
    state = backend.training_state()
    return sum(t.numel() for name, t in state.items() if name.startswith("optimizer.exp_avg"))


def test_what_the_model_cannot_have_is_refused(small_mixtral):
    """Guards that a rank above a side, and a target that is not there, are one line each."""
    with pytest.raises(ConfigError, match=r"core\.lora\.rank must be 1\.\.16 for .*k_proj.*, got 17: lower it"):
        attach(initial_model("mixtral", small_mixtral, 0), LoraSettings(rank=17, targets=("k_proj",)), 0)
    with pytest.raises(ConfigError, match=r"core\.lora\.targets .*got q_proj: leave it out"):
        attach(torch.nn.Linear(2, 2), LoraSettings(targets=("q_proj",)), 0)
    odd = initial_model("mixtral", small_mixtral | {"intermediate_size": 33}, 0)
    with pytest.raises(ConfigError, match=r"core\.lora\.quantize int4 needs an even .*down_proj has 33: choose bf16"):
        attach(odd, LoraSettings(quantize="int4", targets=("down_proj",)), 0)


@pytest.mark.parametrize(
    "other", [{"deepspeed": {"zero_stage": 1}}, {"schedule_steps": 9}, {"safeguards": {"ewc": {"weight": 1.0}}}]
)
def test_what_it_does_not_go_with_is_refused_when_the_file_is_read(tmp_path, other):
    """Guards that an engine, a safeguard or a long schedule is not silently left out."""
    with pytest.raises(ConfigError, match=f"lora must be alone in a core update, got it with {next(iter(other))}"):
        load_tier1(make_workspace(tmp_path, core={"lora": {}, **other}))


@pytest.mark.parametrize("form", ["none", "int4"])
def test_its_delta_is_folded_gated_and_replayed_like_any_other(tmp_path, form):
    """Guards the whole way of a low-rank core update; an error of quantisation in what is published had full rank."""
    fed = make_federation(tmp_path, core={"lora": {"rank": 1, "targets": ["down_proj", "q_proj"], "quantize": form}})
    ref = train_delta(fed, pack_datasets(fed, authorise_training(fed, "a")), "a")
    settled = settle_candidate(fed, fold_dense(fed, ref))
    assert (settled.status, settled.version) == ("head", 1)
    blobs = fed.chain.state().head.dense.blobs
    found = [
        array for digest in blobs.values() for array in decode_blob(fed.archive.get(digest)).values() if array.any()
    ]
    assert {int(np.linalg.matrix_rank(array, rtol=1e-5)) for array in found} == {1}
    verdicts = [line for line in replay_versions(fed) if line.startswith("version")]
    assert ["identical" in line for line in verdicts] == [True, True]


def test_low_rank_has_the_rates_and_the_decay_of_the_run(small_mixtral):
    """Guards the optimiser of the factors: experts at rate 0 stay, attention moves, and decay is felt."""
    moved = {}
    for decay in (0.0, 1.0):
        settings = TrainSettings(
            steps=4, batch_size=4, learning_rate=3e-2, expert_learning_rate=0.0, weight_decay=decay
        )
        backend = LoraBackend(LORA)
        train(initial_model("mixtral", small_mixtral, 0), ROWS, settings, family="mixtral", backend=backend)
        moved[decay] = backend.delta()
    still = {name: not change.any() for name, change in moved[1.0].items()}
    assert still == {name: ".experts." in name for name in still}
    assert set(still.values()) == {True, False}
    assert any(not torch.equal(change, moved[1.0][name]) for name, change in moved[0.0].items())

"""Documents in packed rows: each is trained as if it stood alone, on every engine and however the rows are shared."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.tier1.training.documents_alone import END, FAMILIES, apart_from_alone, enlarged, packed_rows
from tests.tier1.training.rank_process import RankRunner
from tier1.training.documents import positions_of
from tier1.training.model import initial_model

has_deepspeed = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not has_deepspeed, reason="deepspeed is not installed: see docs/training.md")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_is_its_documents_alone(family):
    """Guards the masks: the loss of packed rows is the mean over tokens of their documents'; without them it is not."""
    model, rows = enlarged(family), packed_rows()
    assert apart_from_alone(model, rows, END) <= 1e-6
    assert apart_from_alone(model, rows, None) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_flows_between_documents(family):
    """Guards that the loss of one document does not move with another: its tokens' embeddings get no gradient."""
    model = initial_model(family, FAMILIES[family], 0)
    row = torch.tensor([[9, 2, 3, END, 4, 5, 6, END, 7, 8]])
    labels = row[:, 1:]

    def reached(end):
        positions = None if end is None else positions_of(row[:, :-1], end)
        logits = model(input_ids=row[:, :-1], position_ids=positions, use_cache=False).logits
        nats = torch.nn.functional.cross_entropy(logits[0, 3:7], labels[0, 3:7], reduction="sum")  # 4 5 6 END
        (grad,) = torch.autograd.grad(nats, model.get_input_embeddings().weight)
        return sorted(grad.abs().sum(-1).nonzero().flatten().tolist())

    assert reached(END) == [END, 4, 5, 6]
    assert reached(None) == [END, 2, 3, 4, 5, 6, 9]


def test_positions_restart_at_every_end():
    """Guards the rule itself: the end-of-text token is position 0 of what follows it, also twice in turn."""
    rows = torch.tensor([[5, 6, END, 7, END, END, 8], [END, 5, 6, 7, 8, 9, END]])
    assert positions_of(rows, END).tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 0]]


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with RankRunner(tmp_path_factory.mktemp("ranks"), *(["deepspeed"] if has_deepspeed else [])) as runner:
        yield runner


@pytest.fixture(scope="module")
def whole(runner):
    """Losses of one process, masked."""
    masked, across = (done(runner.run(1, document_end=end, **STILL))[0].losses for end in (1, None))
    assert apart(masked, across) > 1e-4, "the masks matter on these rows"
    return masked


STILL = {"steps": 8, "still": True, "aux_loss": 0.0}  # the balancing loss is that of a pass


def done(ended):
    assert all(one.status == 0 for one in ended), ended
    return ended


def apart(losses, reference):
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 2), (2, 1)])
def test_rows_may_be_shared_in_any_way(runner, whole, ranks, micro_batch):
    """Guards that passes and ranks see the curve of the whole batch: every row has as many labels as any other."""
    first = done(runner.run(ranks, document_end=1, micro_batch=micro_batch, **STILL))[0]
    assert apart(first.losses, whole) <= 1e-5


@needs_deepspeed
@pytest.mark.parametrize(
    "engine", [{"zero_stage": 3}, {"zero_stage": 2, "expert_parallel": 2}], ids=["zero_3", "experts"]
)
def test_every_engine_masks(runner, whole, engine):
    """Guards that positions reach the model through DeepSpeed, its experts cut or not."""
    first, second = done(runner.run(2, document_end=1, engine=engine, **STILL))
    assert first.losses == second.losses
    assert apart(first.losses, whole) <= 1e-4

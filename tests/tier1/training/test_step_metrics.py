"""Step metrics: that they say what happened, change nothing that is trained, and never stop a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from tests.tier1.training.rank_process import RankRunner
from tier1.loops.run_metrics import metrics_writer
from tier1.training.backends import TorchBackend
from tier1.training.loss import balancing_loss
from tier1.training.model import initial_model
from tier1.training.settings import TrainSettings
from tier1.training.step_metrics import StepMetrics
from tier1.training.trainer import batches, train

ROWS = np.random.default_rng(0).integers(0, 20, size=(24, 17)).astype(np.int32)
SETTINGS = TrainSettings(steps=6, batch_size=4, learning_rate=1e-2)


def trained(config, metrics=None, settings=SETTINGS, backend=None):
    model = initial_model("mixtral", config, 0)
    train(model, ROWS, settings, family="mixtral", metrics=metrics, backend=backend)
    return model


def test_measuring_changes_no_bit_and_leaves_the_model_alone(small_mixtral):
    """Guards that a run with metrics is the run without, and that no hook stays behind."""
    rows = []
    measured = trained(small_mixtral, StepMetrics(every=2, write=rows.append))
    plain = trained(small_mixtral)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in measured.state_dict().items())
    assert not measured._forward_hooks


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_rows_say_what_the_step_was(small_mixtral, micro_batch):
    """Guards loss, rate, gradient norm, L_aux and loads against their definitions, computed again from the weights."""
    settings = TrainSettings(steps=1, batch_size=4, learning_rate=1e-2, micro_batch=micro_batch)
    rows = []
    with capture_logs() as logs:
        trained(small_mixtral, StepMetrics(every=1, write=rows.append), settings)
    model = initial_model("mixtral", small_mixtral, 0).train()
    tokens = torch.from_numpy(ROWS[next(batches(len(ROWS), settings))].astype(np.int64))
    output = model(input_ids=tokens[:, :-1], output_router_logits=True)
    aux = balancing_loss(output.router_logits, 2)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    (row,) = rows
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["aux_loss"] == pytest.approx(aux.item(), rel=1e-5)
    assert row["learning_rate"] == 1e-2 * settings.factor(1)
    counts = [torch.bincount(logits.topk(2).indices.flatten(), minlength=4) for logits in output.router_logits]
    loads = torch.stack([count * 4 / count.sum() for count in counts])
    assert (row["load_max"], row["load_min"]) == pytest.approx((loads.max().item(), loads.min().item()))
    if micro_batch is None:  # else the balancing loss is that of each pass
        (loss + settings.aux_loss * aux).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert min(row["tokens_per_s"], row["memory_mib"]) > 0
    event = next(entry for entry in logs if entry["event"] == "core.step")
    assert {key: value for key, value in row.items() if key != "at_ms"}.items() <= event.items()


def test_no_mfu_is_invented(small_mixtral):
    """Guards that on a CPU MFU is said against a declared peak alone, and is then tokens/s in its unit."""
    rows = []
    trained(small_mixtral, StepMetrics(every=6, write=rows.append))
    trained(small_mixtral, StepMetrics(every=6, write=rows.append, peak_flops=1e12))
    assert "mfu" not in rows[0]
    model = initial_model("mixtral", small_mixtral, 0)
    active = sum(p.numel() * (0.5 if ".experts." in name else 1) for name, p in model.named_parameters())
    assert rows[1]["mfu"] == pytest.approx(6 * active * rows[1]["tokens_per_s"] / 1e12, rel=0.01)


def test_a_disk_that_refuses_costs_rows_not_the_run(small_mixtral, tmp_path):
    """Guards that metrics which cannot be written are an event, and that those which can are a line each."""
    (tmp_path / "file").touch()
    with capture_logs() as logs:
        trained(small_mixtral, StepMetrics(every=3, write=metrics_writer(tmp_path / "file" / "rows.jsonl")))
    assert [entry["step"] for entry in logs if entry["event"] == "core.metrics_lost"] == [3, 6]
    trained(small_mixtral, StepMetrics(every=3, write=metrics_writer(tmp_path / "new" / "rows.jsonl")))
    lines = (tmp_path / "new" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6]


def test_the_norm_is_that_before_clipping(small_mixtral):
    """Guards that a clipped gradient shows how large it was."""
    backend, rows = TorchBackend(), []
    settings = TrainSettings(steps=1, batch_size=4, grad_clip=1e-3)
    trained(small_mixtral, StepMetrics(every=1, write=rows.append), settings, backend)
    assert rows[0]["grad_norm"] == backend.grad_norm() > 1e-2


def test_two_ranks_measure_what_one_does_and_one_writes(tmp_path):
    """Guards that gradient norm, L_aux and loads are those of the whole batch, and that rank 0 alone writes."""
    with RankRunner(tmp_path) as runner:
        (alone,) = runner.run(1, steps=4, still=True)
        first, second = runner.run(2, steps=4, still=True)
    assert second.rows == []
    (row,), (expected,) = first.rows, alone.rows
    for name in ("loss", "grad_norm", "aux_loss", "load_max", "load_min"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4), name

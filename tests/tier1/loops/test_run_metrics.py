"""Step metrics of a core update: at a real MLflow server once, whatever was dead or killed on the way."""

from __future__ import annotations

import json
import socket
import uuid
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.embedded import EmbeddedMlflow
from tests.federation import make_federation
from tier1.config import RegistryConfig
from tier1.federation import Federation
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import settle_candidate
from tier1.loops.run_metrics import show_runs
from tier1.loops.views import sync_views


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real MLflow server."""
    with EmbeddedMlflow(tmp_path_factory.mktemp("mlflow")) as running:
        yield running.uri


def federation(directory: Path, uri: str = "file") -> Federation:
    return at(make_federation(directory, core={"steps": 6, "metrics_every": 2}), uri)


def at(fed: Federation, uri: str) -> Federation:
    registry = RegistryConfig(uri=uri, model_name=f"moe-{uuid.uuid4().hex[:8]}")
    return Federation(config=fed.config.model_copy(update={"registry": registry}))


def published(fed: Federation, run: str = "tuesday"):
    return train_delta(fed, pack_datasets(fed, authorise_training(fed, run)), run)


def runs(fed: Federation) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=fed.config.registry.uri)
    experiment = client.get_experiment_by_name(fed.config.registry.model_name)
    found = client.search_runs([experiment.experiment_id], filter_string="tags.base_version = '0'")
    return [(run, client.get_metric_history(run.info.run_id, "train.loss")) for run in found]


def files(fed: Federation) -> list[str]:
    return sorted(path.name.split(".", 1)[1] for path in (fed.home / "dense").glob("*.jsonl"))


def test_a_core_update_is_an_mlflow_run_with_a_curve(tmp_path, server):
    """Guards that people find the curve of a run under its update id, once, however often the views are repaired."""
    fed = federation(tmp_path, server)
    ref = published(fed)
    for _ in range(2):
        sync_views(fed)
        published(fed)
    ((run, losses),) = runs(fed)
    assert run.data.tags["update_id"] == ref.update_id
    assert (run.info.run_name, run.info.status) == ("tuesday", "FINISHED")
    assert [point.step for point in losses] == [2, 4, 6]
    shown = {"loss", "grad_norm", "learning_rate", "aux_loss", "load_max", "load_min", "tokens_per_s", "memory_mib"}
    assert set(run.data.metrics) == {f"train.{name}" for name in shown}
    assert files(fed) == ["metrics.shown.jsonl"]


def test_a_dead_server_stops_no_run_and_gets_its_metrics_later(tmp_path, server):
    """Guards that training and publishing end without MLflow, and that the next repair delivers the curve."""
    with socket.socket() as taken:  # bound, not listening: nobody answers
        taken.bind(("127.0.0.1", 0))
        fed = federation(tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}")
        with capture_logs() as logs:
            ref = published(fed)
    assert [entry["event"] for entry in logs if "metrics" in entry["event"]] == ["core.metrics_waiting"]
    assert ref.base_version == 0
    assert files(fed) == ["metrics.jsonl"]
    alive = at(fed, server)
    show_runs(alive)
    ((_, losses),) = runs(alive)
    assert [point.step for point in losses] == [2, 4, 6]
    assert files(alive) == ["metrics.shown.jsonl"]


def test_a_delivery_that_died_is_finished_and_no_point_doubled(tmp_path, server):
    """Guards the crash between MLflow's run and our note of it, steps taken twice, and a torn line."""
    fed = federation(tmp_path)
    published(fed)
    (shown,) = (fed.home / "dense").glob("*.metrics.shown.jsonl")
    waiting = shown.with_name(shown.name.replace(".shown", ""))
    lines = shown.read_text().splitlines()
    fed = at(fed, server)
    for _ in range(2):
        again = json.dumps(json.loads(lines[1]) | {"loss": 9.0})
        waiting.write_text("\n".join([again, *lines, '{"step": 7, "lo']) + "\n")
        show_runs(fed)
    ((_, losses),) = runs(fed)
    assert [point.step for point in losses] == [2, 4, 6]
    assert max(point.value for point in losses) < 9.0


def test_without_a_server_the_file_registry_keeps_them(tmp_path):
    """Guards the laptop: the same rows, beside the file registry; a candidate of the run settles as ever."""
    fed = federation(tmp_path)
    ref = published(fed)
    settle_candidate(fed, fold_dense(fed, ref))
    kept = json.loads((fed.home / "registry.runs" / f"{ref.update_id}.json").read_bytes())
    assert [row["step"] for row in kept["steps"]] == [2, 4, 6]
    assert kept["name"] == "tuesday"


def test_metrics_may_be_off(tmp_path):
    """Guards that `core.metrics_every: null` writes and logs nothing."""
    fed = make_federation(tmp_path, core={"metrics_every": None})
    with capture_logs() as logs:
        published(fed)
    assert not [entry for entry in logs if entry["event"] == "core.step"]
    assert files(fed) == []


def test_one_unreadable_record_keeps_no_other_run_back(tmp_path):
    """Guards that a torn record beside the chain costs its own curve alone."""
    fed = federation(tmp_path)
    dense = fed.home / "dense"
    dense.mkdir(parents=True)
    (dense / "run-0.json").write_bytes(b"torn")
    (dense / "run-0.metrics.jsonl").write_bytes(b"")
    published(fed)
    assert files(fed) == ["metrics.jsonl", "metrics.shown.jsonl"]

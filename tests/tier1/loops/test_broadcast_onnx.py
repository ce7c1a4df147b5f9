"""The broadcast with an ONNX graph; exporter and runtime are stand-ins, the figure `onnx.parity` runs the real ones."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.results import ROOT
from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ConfigError, SnapshotError
from fednested_lib.events import ModelAvailable, OnnxAvailable, verify_event
from fednested_lib.log import CONTROL
from tests.federation import make_federation
from tier1.federation import Federation
from tier1.loops.broadcast import publish_champion
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import decide, settle_candidate
from tier1.loops.reports import published_html
from tier1.versions import onnx_export


@pytest.fixture
def fed(tmp_path: Path) -> Federation:
    """A federation with a champion that is to be exported."""
    fed = make_federation(tmp_path, broadcast={"onnx": True})
    trained = train_delta(fed, pack_datasets(fed, authorise_training(fed, "r")), "r")
    decide(fed, settle_candidate(fed, fold_dense(fed, trained)), "approve", "flag")
    return fed


class Tools:
    """In place of the exporter and of onnxruntime: the "graph" is the model itself, off by `error`."""

    def __init__(self) -> None:
        self.error, self.raises, self.fails, self.exports = 0.0, None, None, 0

    def export(self, model, sample, config):
        self.exports += 1
        if self.raises:
            raise self.raises
        self.model = model
        return SimpleNamespace(save_pretrained=self.save)

    def save(self, directory: str) -> None:
        for name in onnx_export.FILES:
            (Path(directory) / name).write_bytes(f"{name} of {self.exports}".encode())

    def run(self, names, inputs):
        assert names == ["logits"]
        if self.fails:
            raise self.fails
        with torch.inference_mode():
            logits = self.model(**{name: torch.from_numpy(each) for name, each in inputs.items()}).logits.numpy()
        noisy = logits + self.error * np.abs(logits).max()
        # What padding predicts is nobody's business.
        return [np.where(inputs["attention_mask"][..., None] == 1, noisy, 1e6)]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Tools:
    tools = Tools()
    exporter, runtime = ModuleType("exporter_onnx"), ModuleType("onnxruntime")
    exporter.OnnxExporter = lambda: SimpleNamespace(export=tools.export)
    exporter.OnnxConfig = lambda dynamic: SimpleNamespace(dynamic=dynamic)
    runtime.InferenceSession = lambda path, providers: tools
    monkeypatch.setitem(sys.modules, "transformers.exporters.exporter_onnx", exporter)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.setattr(onnx_export, "version", lambda package: "1.0")
    return tools


def told(fed: Federation) -> list:
    records = fed.log.read(CONTROL, fed.log.watermarks(CONTROL))
    return [verify_event(each.value, dict(each.headers), fed.signer.public_key) for each in records]


def fetch(blobs: BlobStore, record: str, directory: Path) -> Path:
    """Fetch as docs/onnx.md tells a device to."""
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs/onnx.md").read_text(), re.DOTALL)[1], names)
    return names["fetch"](blobs, record, directory)


def test_the_champion_is_announced_as_a_graph_that_can_be_fetched(fed: Federation, tools: Tools, tmp_path: Path):
    """A signed event leads to a record and to both files, byte by byte; a damaged one is not taken."""
    published = publish_champion(fed)
    events = [event for event in told(fed) if isinstance(event, ModelAvailable | OnnxAvailable)]
    assert [event.event for event in events] == ["model_available", "onnx_available"]
    assert events[1].snapshot == published.snapshot == events[0].snapshot
    assert events[1].record == published.onnx
    target = tmp_path / "device"
    target.mkdir()
    assert fetch(fed.blobs, events[1].record, target).read_bytes() == b"model.onnx of 1"
    assert (target / "model.onnx.data").read_bytes() == b"model.onnx.data of 1"
    assert events[1].record in published_html(published)
    digest = next(d for d in fed.blobs.digests() if fed.blobs.get(d) == b"model.onnx.data of 1")
    Path(fed.blobs.location(digest)).write_bytes(b"model.onnx.data of 2")
    with pytest.raises(SnapshotError, match=digest[:12]):
        fetch(fed.blobs, events[1].record, target)


def test_a_version_is_exported_once_and_again_if_its_files_are_gone(fed: Federation, tools: Tools):
    """Rounds without a new champion cost nothing; a graph that somebody removed is made anew."""
    first = publish_champion(fed)
    assert publish_champion(fed) == first
    assert tools.exports == 1
    Path(fed.blobs.location(first.onnx)).unlink()
    publish_champion(fed)
    assert tools.exports == 2


@pytest.mark.parametrize(("error", "raises"), [(2e-4, None), (float("nan"), None), (0.0, RuntimeError("k: no\nop"))])
def test_a_graph_that_is_not_the_model_is_announced_to_nobody(fed: Federation, tools: Tools, error, raises):
    """Guards parity: the snapshot stays published, the reason is one line, the next broadcast tries again."""
    tools.error, tools.raises = error, raises
    before = set(fed.blobs.digests())
    published = publish_champion(fed)
    assert [event.event for event in told(fed) if event.event != "updates_settled"] == ["model_available"]
    assert ("k: no" if raises else "bound 0.0001") in published.onnx
    assert "\n" not in published.onnx
    assert set(fed.blobs.digests()) - before == {published.snapshot}
    tools.error, tools.raises = 5e-5, None
    assert re.fullmatch("[0-9a-f]{64}", publish_champion(fed).onnx)


def test_a_graph_that_does_not_run_is_announced_to_nobody(fed: Federation, tools: Tools):
    """Guards an exporter that is ahead of the runtime: one reason in log and deck, the snapshot stays published."""
    tools.fails = RuntimeError("opset 27 is not known\n  to this onnxruntime")
    published = publish_champion(fed)
    assert [event.event for event in told(fed) if event.event != "updates_settled"] == ["model_available"]
    assert "does not run (RuntimeError: 'opset 27" in published.onnx
    assert "\n" not in published.onnx


def test_missing_packages_are_said_before_anything_is_published(fed: Federation, monkeypatch: pytest.MonkeyPatch):
    """One line with the remedy, and no event at all."""

    def absent(package: str) -> str:
        raise onnx_export.PackageNotFoundError(package)

    monkeypatch.setattr(onnx_export, "version", absent)
    n_events = len(told(fed))
    with pytest.raises(ConfigError, match=r"missing here: onnx, onnxscript, onnx-ir, onnxruntime: install the extra"):
        publish_champion(fed)
    assert len(told(fed)) == n_events

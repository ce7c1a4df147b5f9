"""A version as an ONNX graph, for devices that only infer and have no torch.

    snapshot → transformers' OnnxExporter → model.onnx, model.onnx.data → parity → two blobs and their record

    parity:  max |logits_onnx − logits_torch| ≤ 1e-4 · max |logits_torch|

on fixed tokens of several shapes, padded rows among them, what padding predicts excepted. The graph takes `input_ids`
and `attention_mask` of any batch and length and returns `logits`; weights are fp32, whatever devices that train get.
`torch.onnx.export` alone cannot lower experts whose number of tokens depends on the data; transformers' exporter can.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ConfigError, SnapshotError
from fednested_lib.signing import canonical_json
from fednested_lib.snapshot import SnapshotManifest, build_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGES = ("onnx", "onnxscript", "onnx-ir", "onnxruntime")
FILES = ("model.onnx", "model.onnx.data")  # the graph names its weights by the second, so both keep their names
MAX_DIFFERENCE = 1e-4
SHAPES = ((2, 16), (1, 33), (3, 7))  # of the parity check, [rows, tokens]; the first is what the exporter traces
REFUSALS = ("onnx_export", "onnx_parity")


@dataclass(frozen=True, kw_only=True)
class OnnxArtefact:
    """An exported version: the blob of the record that names its files, and how far its logits are from torch's."""

    record: str
    n_bytes: int
    difference: float


def require_onnx() -> None:
    """Check that what exports and checks is installed.

    Raises:
        ConfigError: a package is missing.
    """
    missing = []
    for package in PACKAGES:
        try:
            version(package)
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        raise ConfigError(
            f"broadcast.onnx needs {', '.join(PACKAGES)}, missing here: {', '.join(missing)}: install the extra `onnx` "
            "(pip install -c constraints.txt -e '.[onnx]') or set broadcast.onnx: false"
        )


def export_onnx(snapshot: SnapshotManifest, digest: str, blobs: BlobStore) -> OnnxArtefact:
    """Export a snapshot, check it against torch, and store it.

    Args:
        snapshot: what is exported.
        digest: of the published snapshot manifest.
        blobs: holds the weights; gets the files and their record.

    Raises:
        SnapshotError: a blob is missing or corrupt, or reason ``onnx_export`` or ``onnx_parity``; nothing was stored.
        StorageError: the disk is full.
    """
    model = build_model(snapshot, blobs).eval()
    model.config.use_cache = False  # the logits alone: no graph outputs for keys and values
    with tempfile.TemporaryDirectory() as directory:
        write_graph(model, Path(directory))
        try:
            difference = parity(model, Path(directory) / FILES[0])
        except Exception as error:  # onnxruntime raises classes of its own for a graph that it cannot load or run
            raise SnapshotError(
                "onnx_parity",
                f"ONNX graph of version {snapshot.version} does not run ({type(error).__name__}: "
                f"{str(error).strip()[:80]!r}): not announced; install an onnxruntime that knows its operators",
            ) from error
        if not difference <= MAX_DIFFERENCE:  # NaN fails
            raise SnapshotError(
                "onnx_parity",
                f"ONNX logits of version {snapshot.version} differ by {difference:.2e} of the largest, bound "
                f"{MAX_DIFFERENCE:g}: not announced; report it with the versions of {', '.join(PACKAGES)} and torch",
            )
        files = {}
        for name in FILES:
            data = (Path(directory) / name).read_bytes()
            files[name] = {"sha256": blobs.put(data), "bytes": len(data)}
    record = {
        "format": "onnx",
        "snapshot": digest,
        "version": snapshot.version,
        "files": files,
        "inputs": ["input_ids", "attention_mask"],
        "outputs": ["logits"],
        "tokenizer": snapshot.tokenizer,
        "difference": difference,
        "made_with": {package: version(package) for package in (*PACKAGES, "torch", "transformers")},
    }
    n_bytes = sum(each["bytes"] for each in files.values())
    return OnnxArtefact(record=blobs.put(canonical_json(record)), n_bytes=n_bytes, difference=difference)


def write_graph(model: PreTrainedModel, directory: Path) -> None:
    """Write a model as `model.onnx` and `model.onnx.data`.

    Raises:
        SnapshotError: reason ``onnx_export``: the exporter cannot translate this model.
    """
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    sample = {name: torch.from_numpy(values) for name, values in next(_inputs(model)).items()}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torch's exporter prints its progress
            exported = OnnxExporter().export(model, sample, config=OnnxConfig(dynamic=True))
            exported.save_pretrained(str(directory))
    except Exception as error:  # the exporter raises whatever the operator that it cannot translate raises
        raise SnapshotError(
            "onnx_export",
            f"{type(model).__name__} cannot be exported to ONNX ({type(error).__name__}: {str(error).strip()[:80]!r}): "
            f"set broadcast.onnx: false, or install other versions of {', '.join(PACKAGES)}",
        ) from error


def parity(model: PreTrainedModel, graph: Path) -> float:
    """Return the largest difference of a graph's logits to its model's, of the model's largest logit."""
    import onnxruntime
    import torch

    from fednested_lib.training import deterministic

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    worst = []
    with deterministic(), torch.inference_mode():
        for inputs in _inputs(model):
            wanted = model(**{name: torch.from_numpy(values) for name, values in inputs.items()}).logits.numpy()
            (found,) = session.run(["logits"], inputs)
            real = inputs["attention_mask"].astype(bool)
            worst.append(np.abs(found - wanted)[real].max() / np.abs(wanted)[real].max())
    return float(np.max(worst))


def _inputs(model: PreTrainedModel) -> Iterator[dict[str, np.ndarray]]:
    """Yield fixed tokens of each shape, int64; the last row of a batch ends in padding but for the traced one."""
    rng = np.random.Generator(np.random.Philox(key=0))
    for position, (rows, tokens) in enumerate(SHAPES):
        mask = np.ones((rows, tokens), np.int64)
        if position and rows > 1:
            mask[-1, tokens // 2 :] = 0
        yield {"input_ids": rng.integers(0, model.config.vocab_size, (rows, tokens)), "attention_mask": mask}

"""The evaluation's statistics and its artefact: intervals that hold what they say, and a graph that is the model."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.registry import Reading, figure
from fednested_lib.blobs import BlobStore
from fednested_lib.signing import sha256_hex
from tier1.evaluation.bootstrap import interval
from tier1.evaluation.gate import Bound, judge
from tier1.evaluation.suites import SuiteResult

SEED = 20261123
ROWS = 42  # of a suite at the default of 4,096 tokens in rows of 96
SUITES = 2000
REPEATS = 5
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
}
SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


@figure("evaluation.coverage", unit="%", bound=">= 92", cls="full")
def coverage() -> float:
    """Share of 95 % intervals of a mean rise that hold the true one: 42 rows, skewed rises, 2,000 drawn suites."""
    rng, held = np.random.default_rng(SEED), 0
    for suite in range(SUITES):
        # A rise that most rows hardly show and a few show strongly: exponential, mean 0.05 nats.
        low, high = interval(rng.exponential(0.05, ROWS), sha256_hex(str(suite).encode()))
        held += low <= 0.05 <= high
    return 100 * held / SUITES


@figure("evaluation.verdict", unit="ms", bound="<= 100")
def verdict() -> Reading:
    """Time of a suite's verdict with its four intervals at the default of 42 rows; median of 5, of 20 suites each."""
    rng, repeats = np.random.default_rng(SEED), []
    parents = {f"s{i}": _result(rng, f"s{i}") for i in range(20)}
    candidates = {
        name: replace(each, row_nats=(np.array(each.row_nats) + 0.01).tolist()) for name, each in parents.items()
    }
    reports = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        reports.append(judge(parents, candidates, default=Bound(max_regression=0.05)))
        repeats.append(1000 * (time.perf_counter() - start) / len(parents))
    if any(report != reports[0] for report in reports):
        raise RuntimeError("two verdicts about the same figures differ")
    return Reading.of(repeats)


def _result(rng: np.random.Generator, name: str) -> SuiteResult:
    row_nats = rng.normal(4.0, 0.5, ROWS).tolist()
    return SuiteResult(
        nats_per_token=float(np.mean(row_nats)),
        bits_per_byte=2.0,
        n_tokens=96 * ROWS,
        n_bytes=10_000,
        rows=sha256_hex(name.encode()),
        lines=list(range(ROWS)),
        row_nats=row_nats,
        row_hits=rng.random(ROWS).tolist(),
        completions=rng.integers(0, 2, ROWS).tolist(),
    )


@figure("onnx.parity", unit="1", bound="<= 0.0001", cls="full")
def onnx_parity() -> float:
    """Largest difference of ONNX logits to torch's, of the largest logit: fetched graphs of the three families."""
    from tier1.training.tokenizer import train_tokenizer
    from tier1.versions.onnx_export import require_onnx

    require_onnx()
    tokenizer = train_tokenizer([f"the {i} winds blow, and crack your cheeks; rage" for i in range(80)], 280)
    return max(_family_parity(family, tokenizer) for family in FAMILIES)


def _family_parity(family: str, tokenizer: bytes) -> float:
    """Export one family through the blob store, fetch it as a device does, and compare it on other tokens."""
    import onnxruntime
    import torch

    from fednested_lib.snapshot import SnapshotManifest, describe_config, write_state_dict
    from tier1.training.model import initial_model
    from tier1.versions import onnx_export

    model = initial_model(family, SMALL | FAMILIES[family], SEED).eval()
    with tempfile.TemporaryDirectory() as directory:
        blobs = BlobStore(Path(directory) / "blobs")
        snapshot = SnapshotManifest(
            version=1,
            family=family,
            model_config=describe_config(model.config),
            tokenizer=blobs.put(tokenizer),
            blobs=write_state_dict(model.state_dict(), family, blobs),
        )
        made = onnx_export.export_onnx(snapshot, blobs.put(snapshot.to_json()), blobs)
        for name, file in json.loads(blobs.get(made.record))["files"].items():
            (Path(directory) / name).write_bytes(blobs.get(file["sha256"], max_bytes=file["bytes"]))
        graph = Path(directory) / onnx_export.FILES[0]
        session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        tokens = np.random.default_rng(SEED).integers(0, SMALL["vocab_size"], (5, 40))
        with torch.inference_mode():
            wanted = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
        (found,) = session.run(["logits"], {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
        _require_refusal(model, graph)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _require_refusal(model, graph: Path) -> None:
    """Check that the comparison sees a model that is not the graph's."""
    import torch

    from tier1.versions.onnx_export import MAX_DIFFERENCE, parity

    with torch.no_grad():
        model.lm_head.weight.mul_(1.001)
    if parity(model, graph) <= MAX_DIFFERENCE:
        raise RuntimeError("the parity check does not see a head that is 0.1 % too large")

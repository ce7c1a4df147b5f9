"""The yardstick: a centralised LoRA that sees every device's text at once.

It gets the same tokens (every row that a device trained on) and the same number of sequential steps: rounds · local
steps, each over the batches of all devices together; the best of three learning rates counts.

    gap closed = (loss of first snapshot − loss of last champion) / (loss of first snapshot − loss of centralised LoRA)
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

LEARNING_RATES = (0.004, 0.008, 0.016)  # on three seeds the middle one was best


def centralised_loss(
    snapshot_path: Path,
    blobs: Path,
    train: Sequence[Path],
    heldout: Mapping[str, Path],
    *,
    steps: int,
    batch_size: int,
    rate: float,
    seq_len: int,
    rank: int,
    alpha: float,
    seed: int,
    max_tokens: int,
) -> dict[str, float]:
    """Train one centralised LoRA and return its held-out loss per device suite, nats per token."""
    from fednested_lib.adapters import attach
    from fednested_lib.blobs import BlobStore
    from fednested_lib.delta import AdapterSpec
    from fednested_lib.snapshot import SnapshotManifest, build_model
    from fednested_lib.text import load_tokenizer, pack, read_texts
    from fednested_lib.training import train_adapters
    from tier1.evaluation.suites import measure, pack_suite

    store = BlobStore(blobs)
    manifest = SnapshotManifest.from_json(snapshot_path.read_bytes())
    tokenizer_bytes = store.get(manifest.tokenizer)
    tokenizer = load_tokenizer(tokenizer_bytes)
    rows = np.concatenate([pack(read_texts(path)[0], tokenizer, seq_len) for path in train])
    model = build_model(manifest, store, experts="fednested_lora")
    adapters = attach(model, AdapterSpec(rank=rank, alpha=alpha), None, seed)
    train_adapters(model, adapters, rows, steps=steps, batch_size=batch_size, learning_rate=rate, seed=seed)
    suites = {
        name: pack_suite(path, tokenizer_bytes, seq_len=seq_len, max_tokens=max_tokens)
        for name, path in heldout.items()
    }
    return {name: measure(model, suite).nats_per_token for name, suite in suites.items()}


def run_all(
    arguments: Mapping, rates: Sequence[float] = LEARNING_RATES, *, parallel: int = 2
) -> dict[float, dict[str, float]]:
    """Run one process per learning rate, `parallel` at a time; returns rate → suite → loss."""
    waiting, running, results = list(rates), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                rate = waiting.pop(0)
                argument = json.dumps({**arguments, "rate": rate})
                command = [sys.executable, "-m", "examples.shakespeare.baseline", argument]
                running[rate] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            rate, process = next(iter(running.items()))
            output, _ = process.communicate()
            if process.returncode != 0:
                raise RuntimeError(f"centralised LoRA at learning rate {rate} ended with code {process.returncode}")
            results[rate] = json.loads(output.splitlines()[-1])
            del running[rate]
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return results


def main() -> None:
    """Run one baseline, described by one JSON argument, and print its losses as JSON."""
    arguments = json.loads(sys.argv[1])
    for key in ("snapshot_path", "blobs"):
        arguments[key] = Path(arguments[key])
    arguments["train"] = [Path(path) for path in arguments["train"]]
    arguments["heldout"] = {name: Path(path) for name, path in arguments["heldout"].items()}
    print(json.dumps(centralised_loss(**arguments)))


if __name__ == "__main__":
    main()

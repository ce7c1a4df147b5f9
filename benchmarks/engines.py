"""One engine on random rows, on whatever torchrun starts: tokens per second, memory and MFU of one model.

    torchrun --nproc_per_node=8 -m benchmarks.engines
    torchrun --nproc_per_node=8 -m benchmarks.engines --engine '{"zero_stage": 2, "expert_parallel": 8, "bf16": true}'

The first steps warm up and are not counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from tier1.training.backends import Backend, TorchBackend
from tier1.training.deepspeed_config import DeepSpeedSettings
from tier1.training.meter import Meter
from tier1.training.model import initial_model
from tier1.training.ranks import join_ranks
from tier1.training.settings import TrainSettings
from tier1.training.trainer import train

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
WARM_UP = 3


def main() -> None:
    """Train and print, on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=json.loads, help="core.deepspeed as JSON; plain torch without it")
    parser.add_argument("--shape", type=json.loads, default={}, help="changes of the Mixtral's configuration, JSON")
    parser.add_argument("--rows", type=int, default=8, help="per rank and step")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--recompute", action="store_true", help="core.activation_checkpointing")
    args = parser.parse_args()
    with join_ranks(1800) as ranks:
        shape = SHAPE | args.shape
        model = initial_model("mixtral", shape, 0)
        settings = TrainSettings(
            steps=args.steps,
            batch_size=args.rows * ranks.world_size,
            learning_rate=1e-4,
            activation_checkpointing=args.recompute,
        )
        rows = np.random.default_rng(0).integers(0, shape["vocab_size"], (settings.batch_size, args.seq_len + 1))
        meters, size = [Meter(model, "mixtral", ranks)], model.num_parameters()

        def on_step(step: int, loss: float) -> None:
            if step == WARM_UP:
                meters.append(meters[0].again())
            elif step > WARM_UP:
                meters[-1].count(rows[:, 1:].size)

        backend = _backend(args.engine)
        report = train(model, rows, settings, family="mixtral", backend=backend, ranks=ranks, on_step=on_step)
        if ranks.rank == 0:
            speed = meters[-1].read()
            said = {"engine": args.engine, "ranks": ranks.world_size, "device": ranks.device, "parameters": size}
            print(json.dumps(said | vars(speed) | {"loss_last": report.loss_last}))


def _backend(engine: dict | None) -> Backend:
    if engine is None:
        return TorchBackend()
    from tier1.training.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(DeepSpeedSettings(**engine))


if __name__ == "__main__":
    main()

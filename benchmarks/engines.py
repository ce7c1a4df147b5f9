"""One engine on random rows, on whatever torchrun starts: tokens per second, memory and MFU of one model.

    torchrun --nproc_per_node=8 -m benchmarks.engines --plain
    torchrun --nproc_per_node=8 -m benchmarks.engines
    torchrun --nproc_per_node=8 -m benchmarks.engines --engine '{"zero_stage": 2, "expert_parallel": 8, "bf16": true}'

`--plain` is what one would write without this project: the model of transformers, torch's DDP, AdamW and autocast to
bf16, the loss that the model returns. The first steps warm up and are not counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tier1.training.backends import Backend, TorchBackend
from tier1.training.deepspeed_config import DeepSpeedSettings
from tier1.training.meter import Meter
from tier1.training.model import initial_model
from tier1.training.ranks import Ranks, join_ranks
from tier1.training.settings import TrainSettings
from tier1.training.trainer import OnStep, train

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
    parser.add_argument("--plain", action="store_true", help="plain torch and transformers, bf16 by autocast")
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

        if args.plain:
            loss_last = _train_plain(model, rows, settings, ranks, on_step)
        else:
            backend = _backend(args.engine)
            report = train(model, rows, settings, family="mixtral", backend=backend, ranks=ranks, on_step=on_step)
            loss_last = report.loss_last
        if ranks.rank == 0:
            engine = "plain" if args.plain else args.engine
            said = {"engine": engine, "ranks": ranks.world_size, "device": ranks.device, "parameters": size}
            print(json.dumps(said | vars(meters[-1].read()) | {"loss_last": loss_last}))


def _train_plain(model: nn.Module, rows: np.ndarray, settings: TrainSettings, ranks: Ranks, on_step: OnStep) -> float:
    """Train on this rank's rows, the same in every step, and return the last loss."""
    model = model.to(ranks.device).train()
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable()
    whole = DistributedDataParallel(model) if ranks.world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    mine = torch.from_numpy(rows[ranks.share_of(len(rows))]).to(ranks.device)
    for step in range(1, settings.steps + 1):
        with torch.autocast(torch.device(ranks.device).type, torch.bfloat16):
            loss = whole(input_ids=mine, labels=mine, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step, loss.item())
    return loss.item()


def _backend(engine: dict | None) -> Backend:
    if engine is None:
        return TorchBackend()
    from tier1.training.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(DeepSpeedSettings(**engine))


if __name__ == "__main__":
    main()

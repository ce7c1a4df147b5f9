"""A training that was paused or killed goes on where it was and gives the bits of one that never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from fednested_lib.adapters import attach
from fednested_lib.checkpoint import Checkpoint
from fednested_lib.delta import AdapterSpec, encode
from fednested_lib.training import train_adapters

ROOT = Path(__file__).parents[2]

ROWS = np.random.default_rng(0).integers(0, 96, (10, 13), dtype=np.int32)
HOW = {"steps": 7, "batch_size": 4, "learning_rate": 1e-2, "seed": 5}
SPEC = AdapterSpec(rank=3, alpha=6.0)


class Paused(Exception):
    pass


def _stop_after(step: int):
    def on_step(done: int, _loss: float) -> None:
        if done == step:
            raise Paused

    return on_step


def _trained(make_model, checkpoint=None, *, on_step=None, experts=None):
    """Train in a model and adapters of their own, as a fresh process does."""
    model = make_model("mixtral")
    adapters = attach(model, SPEC, experts, seed=1)
    report = train_adapters(model, adapters, ROWS, **HOW, on_step=on_step, checkpoint=checkpoint)
    return report, adapters.tokens, adapters.distinct_tokens, encode(adapters.to_delta(), encoding="fp32", seed=0)


def _checkpoint(tmp_path, *, training="a" * 64, every=2):
    return Checkpoint(tmp_path / "checkpoint", training=training, every=every)


@pytest.mark.parametrize("experts", [None, {0: (1, 4), 2: (0,)}])
def test_paused_training_goes_on_to_the_same_bits(make_model, tmp_path, experts):
    """Stopped twice, at steps with and without a checkpoint of their own: report, counts and factors are the same."""
    whole = _trained(make_model, experts=experts)
    for step in (1, 4):
        with pytest.raises(Paused):
            _trained(make_model, _checkpoint(tmp_path, every=None), on_step=_stop_after(step), experts=experts)
    steps = []
    resumed = _trained(
        make_model, _checkpoint(tmp_path), on_step=lambda step, _loss: steps.append(step), experts=experts
    )
    assert steps == [5, 6]
    assert resumed == whole


def test_a_checkpoint_of_another_training_is_none(make_model, tmp_path):
    """Other text, settings or job, or an altered file: the training starts from the beginning and raises nothing."""
    whole = _trained(make_model)
    with pytest.raises(Paused):
        _trained(make_model, _checkpoint(tmp_path), on_step=_stop_after(3))
    steps = []
    other = _checkpoint(tmp_path, training="b" * 64)
    assert _trained(make_model, other, on_step=lambda step, _loss: steps.append(step)) == whole
    assert steps == list(range(7))
    path = tmp_path / "checkpoint"
    data = path.read_bytes()
    for damaged in (data[:-5], data[:-1] + bytes([data[-1] ^ 1]), b"\x80\x04K\x01.", b""):
        path.write_bytes(damaged)
        steps.clear()
        assert _trained(make_model, _checkpoint(tmp_path), on_step=lambda step, _loss: steps.append(step)) == whole
        assert steps == list(range(7))


def test_the_last_step_writes_none_and_removal_forgets(make_model, tmp_path):
    """A training that is done leaves the checkpoint of an earlier step at most, until it is removed."""
    checkpoint = _checkpoint(tmp_path, every=7)
    _trained(make_model, checkpoint)
    assert not checkpoint.path.exists()
    checkpoint = _checkpoint(tmp_path, every=6)
    _trained(make_model, checkpoint)
    assert checkpoint.path.exists()
    checkpoint.remove()
    checkpoint.remove()
    assert not checkpoint.path.exists()


def _victim(path: Path, die: int) -> bytes:
    """Train a small model with checkpoints, and kill this process after a step."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=96, num_key_value_heads=2, num_local_experts=4, bos_token_id=None, eos_token_id=0, **shape
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    adapters = attach(model, AdapterSpec(rank=2, alpha=4.0), None, seed=1)

    def on_step(step: int, _loss: float) -> None:
        if step == die:
            os.kill(os.getpid(), signal.SIGKILL)

    train_adapters(
        model, adapters, ROWS, **HOW, on_step=on_step, checkpoint=Checkpoint(path, training="a" * 64, every=2)
    )
    return encode(adapters.to_delta(), encoding="fp32", seed=0)


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path):
    """Killed by SIGKILL after a step without a checkpoint, another process goes on and ends with the same bits."""
    path = tmp_path / "killed"
    code = "import sys, pathlib, tests.fednested_lib.test_checkpoint as t; t._victim(pathlib.Path(sys.argv[1]), 4)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    header = json.loads(path.read_bytes().partition(b"\n")[0])
    assert header["steps_done"] == 4
    assert _victim(path, -1) == _victim(tmp_path / "whole", -1)

"""Rows of the engines, small."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks import rows_engine


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_the_memory_of_plain_torch_is_that_of_a_process_without_deepspeed(monkeypatch):
    """Guards `training.memory_torch`: to import DeepSpeed takes memory, which is the price of its layouts alone."""
    monkeypatch.setattr(rows_engine, "LAYOUTS", {"torch": None, "zero_1": {"zero_stage": 1}})
    monkeypatch.setattr(rows_engine, "TIMED", {"steps": 2, "still": True})
    runs = rows_engine._timed.__wrapped__()
    assert {name: run.deepspeed for name, run in runs.items()} == {"torch": False, "zero_1": True}

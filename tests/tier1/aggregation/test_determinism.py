from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.tier1.aggregation.permuted import digests

pytestmark = pytest.mark.usefixtures("many_folds")


def in_a_fresh_process(n_orders: int, threads: int, seed: int) -> list[str]:
    command = [sys.executable, "-m", "tests.tier1.aggregation.permuted", *map(str, (n_orders, threads, seed))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(seed)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


def test_a_hundred_orders_threads_and_processes_give_one_digest():
    """Permuted arrival, one and two threads, this process and fresh ones: 100 folds, one digest."""
    before = torch.get_num_threads()
    try:
        found = digests(30, 1, 1) + digests(30, 2, 2)
    finally:
        torch.set_num_threads(before)
    found += in_a_fresh_process(20, 1, 3) + in_a_fresh_process(20, 2, 4)
    assert len(found) == 100
    assert len(set(found)) == 1

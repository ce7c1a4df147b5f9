"""The aggregation's claims: exactness, determinism, memory, and speed beside dense formation and dense SVD.

Items 1 to 5 of issue 3. Where a figure is a ratio of times both sides are measured in turn, in this process, on one
thread, after their results were compared; the time is that of the processor, so that a neighbour on the machine does
not count. Memory is the resident set of a fresh process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from statistics import median

import numpy as np
import torch

from benchmarks.registry import Reading, figure
from benchmarks.results import ROOT
from tier1.aggregation.fold import fold_matrix, one_thread
from tier1.aggregation.gram import Gram, matrix_gram
from tier1.aggregation.registry import choose
from tier1.versions.settings import AggregationSettings

REPEATS = 5
D, R, N = 4096, 16, 10  # one expert matrix, rank, updates: the shape of issue 3, item 5
GRAM_RULES = ("krum", "multi_krum", "geometric_median", "centred_clipping", "foolsgold")
SUITE = "tests/tier1/aggregation"


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def ratios(left: Callable[[], object], right: Callable[[], object], repeats: int = REPEATS) -> Reading:
    """Time both in turn and return left / right."""
    left(), right()
    return Reading.of([seconds(left) / seconds(right) for _ in range(repeats)])


@cache
def case() -> tuple[np.ndarray, list[tuple[float, np.ndarray, np.ndarray]]]:
    """Return W and N updates (s, A, B) of one expert matrix."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((D, D), dtype=np.float32)
    terms = [
        (0.5, rng.standard_normal((R, D), dtype=np.float32), rng.standard_normal((D, R), dtype=np.float32) / 64)
        for _ in range(N)
    ]
    return weight, terms


def weigh(rule: str, gram: Gram) -> np.ndarray:
    """Apply a rule with its defaults."""
    return choose(AggregationSettings(rule=rule)).weigh(gram, np.ones(gram.n))


def low_rank(rule: str) -> np.ndarray:
    """Aggregate and fold as the product does: Gram, rule, fold."""
    weight, terms = case()
    weights = weigh(rule, matrix_gram(terms))
    kept = [(s * float(w), a, b) for (s, a, b), w in zip(terms, weights, strict=True) if w > 0]
    return fold_matrix(weight, kept)


def dense(rule: str) -> np.ndarray:
    """Aggregate as peers do: form every update, compare the long vectors, average, add."""
    weight, terms = case()
    vectors = torch.stack(
        [(torch.from_numpy(b).double().mul_(s) @ torch.from_numpy(a).double()).ravel() for s, a, b in terms]
    )
    inner = (vectors @ vectors.T).numpy()
    squares = np.diag(inner)
    gram = Gram(inner=inner, distance2=np.maximum(squares[:, None] + squares[None, :] - 2 * inner, 0))
    step = torch.from_numpy(weigh(rule, gram)) @ vectors
    return (torch.from_numpy(weight) + step.view(D, D)).float().numpy()


def dense_svd() -> np.ndarray:
    """Average dense updates, cut the mean back to rank ΣR by SVD, add (FlexLoRA and its kin)."""
    weight, terms = case()
    mean = sum(torch.from_numpy(b).mul(s / N) @ torch.from_numpy(a) for s, a, b in terms)
    u, singular, v = torch.linalg.svd(mean, full_matrices=False)
    rank = N * R
    return (torch.from_numpy(weight) + (u[:, :rank] * singular[:rank]) @ v[:rank]).numpy()


@figure("aggregation.oracle", unit="1", bound="== 1000", cls="full")
def oracle() -> float:
    """Random schedules, of 1,000, that equal the independent fp64 dense oracle to 1e-6, through admission and fold."""
    return 1000.0 if tests_pass(f"{SUITE}/test_conformance.py", "equal_the_dense_oracle") else 0.0


@figure("aggregation.peer_bugs", unit="1", bound="== 6", cls="full")
def peer_bugs() -> float:
    """Planted formulas of peers, of six, that turn the conformance suite red."""
    return 6.0 if tests_pass(f"{SUITE}/test_conformance.py", "goes_red") else 0.0


@figure("aggregation.rules", unit="1", bound="<= 1e-6")
def rules() -> float:
    """Largest difference of a robust rule's aggregate to its dense definition, of what the updates differ by."""
    from tests import oracle as dense_rules

    worst = 0.0
    for spread in (1.0, 1e-3, 1e-6):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(3, 24)), rng.normal(size=(20, 3))
        terms = [(1.0, a + spread * rng.normal(size=a.shape), b + spread * rng.normal(size=b.shape)) for _ in range(9)]
        x = np.stack([(tb.astype(np.longdouble) @ ta.astype(np.longdouble)).ravel() for _, ta, tb in terms])
        with one_thread():
            gram = matrix_gram(terms)
        scale = np.sqrt(((x - x[0]) ** 2).sum(axis=1)).max()
        for rule in GRAM_RULES:
            weights = weigh(rule, gram).astype(np.longdouble)
            found = weights @ (x - x[0]) + x[0]
            worst = max(
                worst, float(np.linalg.norm((found - dense_rules.robust(rule, x, np.ones(9))).astype(float)) / scale)
            )
    return worst


@figure("aggregation.ragged", unit="1", bound="== 10000", cls="full")
def ragged() -> float:
    """Random ragged buffers, of 10,000, folded with untouched experts bit-identical, half with an outer optimiser."""
    return 10_000.0 if tests_pass(f"{SUITE}/test_ragged.py", "ragged") else 0.0


@figure("aggregation.digests", unit="1", bound="== 1")
def digests() -> float:
    """Different digests among 100 folds of one buffer: permuted arrival, 1 and 2 threads, fresh processes."""
    found: list[str] = []
    for threads, seed in ((1, 1), (2, 2), (1, 3), (2, 4)):
        command = [sys.executable, "-m", "tests.tier1.aggregation.permuted", "25", str(threads), str(seed)]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
        found += done.stdout.split()
    if len(found) != 100:
        raise RuntimeError(f"100 folds must give 100 digests, got {len(found)}")
    return float(len(set(found)))


@figure("aggregation.determinism_cost", unit="x", bound="<= 1.5", cls="full")
def determinism_cost() -> Reading:
    """Time of the fold at 4096×4096, r = 16, N = 10 over `torch.matmul` of equal shape, fp64, one thread."""
    weight, terms = case()
    with one_thread():
        left, right = operands()
        return ratios(lambda: fold_matrix(weight, terms), lambda: torch.matmul(left, right))


@figure("aggregation.gemm_share", unit="%", bound=">= 70", cls="full")
def gemm_share() -> Reading:
    """Rate of the fold at 4096×4096, of the fp64 GEMM rate at the same shape, K = Σr and thread."""
    weight, terms = case()
    with one_thread():
        left, right = operands()
        found = ratios(lambda: torch.matmul(left, right), lambda: fold_matrix(weight, terms))
    return Reading(value=100 * found.value, low=100 * found.low, high=100 * found.high)


@figure("aggregation.fp32_gemm_share", unit="%", cls="full")
def fp32_gemm_share() -> Reading:
    """The same against an fp32 GEMM, which overflows on hostile factors and rounds K times."""
    weight, terms = case()
    with one_thread():
        left, right = (operand.float() for operand in operands())
        found = ratios(lambda: torch.matmul(left, right), lambda: fold_matrix(weight, terms))
    return Reading(value=100 * found.value, low=100 * found.low, high=100 * found.high)


@figure("aggregation.gram_share", unit="%", bound="<= 25", cls="full")
def gram_share() -> Reading:
    """Time of Gram matrix and rule, of the fold's time at 4096×4096, r = 16, N = 10; the worst rule."""
    weight, terms = case()
    with one_thread():
        shares = {
            rule: ratios(lambda rule=rule: weigh(rule, matrix_gram(terms)), lambda: fold_matrix(weight, terms))
            for rule in GRAM_RULES
        }
    worst = max(shares.values(), key=lambda reading: reading.value)
    return Reading(value=100 * worst.value, low=100 * worst.low, high=100 * worst.high)


@figure("aggregation.over_dense", unit="x", bound=">= 10", cls="full")
def over_dense() -> Reading:
    """Speed of Gram, geometric median and fold over the same with dense updates, both fp64 and one thread."""
    with one_thread():
        np.testing.assert_allclose(low_rank("geometric_median"), dense("geometric_median"), rtol=1e-5, atol=1e-5)
        return ratios(lambda: dense("geometric_median"), lambda: low_rank("geometric_median"))


@figure("aggregation.over_svd", unit="x", bound=">= 50", cls="full")
def over_svd() -> Reading:
    """Speed of the fold over the dense-SVD way at 4096×4096, r = 16, N = 10, one thread."""
    weight, terms = case()
    mean = [(s / N, a, b) for s, a, b in terms]
    with one_thread():
        took = seconds(lambda: np.testing.assert_allclose(dense_svd(), fold_matrix(weight, mean), rtol=1e-3, atol=1e-3))
        folds = [seconds(lambda: fold_matrix(weight, mean)) for _ in range(REPEATS)]
    took -= median(folds)
    return Reading.of([took / fold for fold in folds])


@figure("aggregation.peak_memory", unit="%", bound="<= 100", cls="full")
def peak_memory() -> float:
    """Peak memory above what imports take, of one shard (a layer's experts) plus 2.5 times its adapters, 64 clients."""
    run = memory(64)
    return 100 * run["peak"] / (run["shard"] + 2.5 * run["adapters"])


@figure("aggregation.memory_slope", unit="%", bound="<= 1", cls="full")
def memory_slope() -> float:
    """Growth of peak memory above imports per client from 4 to 64 clients, of the peak with 4."""
    few, many = memory(4)["peak"], memory(64)["peak"]
    return 100 * (many - few) / 60 / few


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    """Return [d, K] and [K, d] in fp64."""
    return torch.randn(D, N * R, dtype=torch.float64), torch.randn(N * R, D, dtype=torch.float64)


def tests_pass(path: str, keyword: str) -> bool:
    """Run tests of the repository in a fresh process; the figure is what their docstrings say they count."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path, "-k", keyword]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout.strip().splitlines()[-1])
    return done.returncode == 0


@cache
def memory(n_clients: int) -> dict[str, float]:
    """Fold a model of 4 layers × 8 experts in a fresh process and return bytes: peak, shard, adapters, process."""
    command = [sys.executable, "-m", "benchmarks.fold_memory", str(n_clients)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])

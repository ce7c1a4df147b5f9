"""What `__main__` prints and `rows_peers` registers: both sides on the same numbers, checked equal, then timed in turn.

flwr averages A and B separately; the product of the means is not the mean of the products. So equality is checked where
both say the same: each side against a mean that numpy computes from the file, in fp64, and each with one client against
the other, within what int8 may move. How far flwr's product lies from the mean of the updates is a number of its own.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import structlog

from benchmarks.aggregation import workload
from benchmarks.aggregation.ours import Federation
from benchmarks.aggregation.worker import Worker
from benchmarks.aggregation.workload import Shape
from fednested_lib.delta import Delta, ExpertFactors
from fednested_lib.log import KafkaLog
from services.embedded import EmbeddedBroker
from tier1.versions.settings import AggregationSettings

Averages = dict[str, np.ndarray]  # "<parameter>|<factor>|<expert>" -> mean factor
INT8_STEPS = 127


class NotEqual(RuntimeError):
    """The sides do not compute the same thing, so no time is reported."""


@contextmanager
def scene(
    shape: Shape, n_clients: int, settings: AggregationSettings | None = None
) -> Iterator[tuple[Federation, list[Delta], list[Path]]]:
    """Write the workload, start a real broker, and yield (federation, deltas, one .npz per client)."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory(prefix="fednested-bench-") as directory:
        home = Path(directory)
        paths = [home / f"client-{client}.npz" for client in range(n_clients)]
        for client, path in enumerate(paths):
            workload.write(shape, client, path)
        with EmbeddedBroker(home / "broker") as broker:
            log = KafkaLog(broker.bootstrap)
            federation = Federation(home / "federation", shape, n_clients, log, settings)
            try:
                yield federation, [workload.read(shape, path) for path in paths], paths
            finally:
                federation.close()
                log.close()
                structlog.configure(**before)


def product(delta: Delta, name: str, row: int) -> np.ndarray:
    """Return s·B·A of one expert matrix, fp64."""
    factors = delta.factors[name]
    return delta.spec.scale * factors.lora_b[row].astype(np.float64) @ factors.lora_a[row].astype(np.float64)


def sample(shape: Shape) -> list[tuple[str, int]]:
    """Return the first and last adapted expert of every parameter, the last layer's bounds included."""
    return [
        (name, expert)
        for name in shape.params
        for expert in (shape.adapted(int(name.split(".")[2]))[0], shape.adapted(int(name.split(".")[2]))[-1])
    ]


def check_ours(federation: Federation, deltas: Sequence[Delta]) -> None:
    """Compare the fold of unrounded updates with the mean of their products.

    Raises:
        NotEqual: further apart than fp32 allows.
    """
    done = federation.run(deltas, "fp32")
    for name, expert in sample(federation.shape):
        mean = sum(product(delta, name, expert) for delta in deltas) / len(deltas)
        apart = np.linalg.norm(federation.step(done.candidate, name, expert) - mean) / np.linalg.norm(mean)
        if not apart <= 1e-6:
            raise NotEqual(f"the fold of {name}, expert {expert}, is {apart:.3g} from the mean of the updates")


def check_averages(deltas: Sequence[Delta], averages: Averages, n_tensors: int) -> None:
    """Compare a peer's averages with the means of the factors.

    Raises:
        NotEqual: a tensor is missing or further apart than fp32 allows.
    """
    if len(averages) != n_tensors:
        raise NotEqual(f"the peer returned {len(averages)} tensors of {n_tensors}")
    for key, found in averages.items():
        name, factor, expert = key.split("|")
        mean = np.mean([getattr(d.factors[name], factor)[int(expert)] for d in deltas], axis=0, dtype=np.float64)
        if not np.linalg.norm(found - mean) <= 1e-6 * np.linalg.norm(mean):
            raise NotEqual(f"the peer's average of {key} is not the mean of the factors")


def check_one_client(federation: Federation, delta: Delta, averages: Averages) -> float:
    """Compare int8 through our path with a peer's fp32, one client; returns the largest share of the bound used.

    Rounding moves an entry by less than its vector's scale, so ‖e_A‖² ≤ Σ_r d·(max|A_r|/127)², likewise e_B, and
    ‖ΔW′ − ΔW‖ ≤ s·((‖B‖ + ‖e_B‖)·‖e_A‖ + ‖e_B‖·‖A‖).

    Raises:
        NotEqual: further apart than that.
    """
    done, worst = federation.run([delta], "int8"), 0.0
    for name, expert in sample(federation.shape):
        a, b = (averages[f"{name}|{factor}|{expert}"].astype(np.float64) for factor in ("lora_a", "lora_b"))
        moved_a, moved_b = _rounding(a, 1), _rounding(b, 0)
        norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
        bound = delta.spec.scale * ((norm_b + moved_b) * moved_a + moved_b * norm_a)
        apart = np.linalg.norm(federation.step(done.candidate, name, expert) - delta.spec.scale * b @ a)
        worst = max(worst, apart / bound)
    if not worst <= 1:
        raise NotEqual(f"int8 moved the update by {worst:.3g} of what rounding may")
    return worst


def factor_error(deltas: Sequence[Delta], averages: Averages, shape: Shape) -> float:
    """Return ‖s·B̄·Ā − mean ΔW‖ / ‖mean ΔW‖ over the sample: what averaging A and B separately gets wrong."""
    wrong = right = 0.0
    for name, expert in sample(shape):
        mean = sum(product(delta, name, expert) for delta in deltas) / len(deltas)
        a, b = (averages[f"{name}|{factor}|{expert}"].astype(np.float64) for factor in ("lora_a", "lora_b"))
        wrong += float(((deltas[0].spec.scale * b @ a - mean) ** 2).sum())
        right += float((mean**2).sum())
    return (wrong / right) ** 0.5


def averages_of(worker: Worker, path: Path) -> Averages:
    """Fetch a worker's last aggregate."""
    worker.ask(f"write {path}")
    with np.load(path) as stored:
        return {key: stored[key] for key in stored.files}


def broken(delta: Delta) -> Delta:
    """Return the delta with every number NaN."""
    factors = {
        name: ExpertFactors(
            expert_ids=each.expert_ids,
            lora_a=np.full_like(each.lora_a, np.nan),
            lora_b=np.full_like(each.lora_b, np.nan),
        )
        for name, each in delta.factors.items()
    }
    return Delta(spec=delta.spec, factors=factors)


def _rounding(factor: np.ndarray, axis: int) -> float:
    """Return the most that int8 moves a factor, Frobenius."""
    return float(np.sqrt((factor.shape[axis] * (np.abs(factor).max(axis=axis) / INT8_STEPS) ** 2).sum()))

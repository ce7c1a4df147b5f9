"""What `__main__` prints and `rows_peers` registers: both sides on the same numbers, checked equal, then timed in turn.

flwr averages A and B separately; the product of the means is not the mean of the products. So equality is checked where
both say the same: each side against a mean that numpy computes from the file, in fp64, and each with one client against
the other, within what int8 may move. How far flwr's product lies from the mean of the updates is a number of its own.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from benchmarks.aggregation import workload
from benchmarks.aggregation.deployment import Deployment
from benchmarks.aggregation.environment import PeerMissing
from benchmarks.aggregation.ours import Federation
from benchmarks.aggregation.worker import Worker
from benchmarks.aggregation.workload import Shape
from fednested_lib.delta import Delta, Encoding
from fednested_lib.log import KafkaLog
from fednested_lib.snapshot import SLICE_TENSOR, read_slice
from services.embedded import EmbeddedBroker
from tier1.versions.settings import AggregationSettings

Averages = dict[str, np.ndarray]  # "<parameter>|<factor>|<expert>" -> mean factor
INT8_STEPS = 127


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """What one run measured: per repeat, wall seconds of each phase; all sides in turn, after they were found equal.

    Args:
        seconds: side → phase → seconds per repeat.
        sent_bytes: side → bytes of one update on the wire.
        factor_error: of averaging A and B separately, relative.
        int8_share: of the rounding bound that int8 uses with one client.
        absent: side → why it was not measured.
    """

    seconds: dict[str, dict[str, list[float]]]
    sent_bytes: dict[str, int]
    factor_error: float
    int8_share: float
    absent: dict[str, str]

    def totals(self, side: str) -> list[float]:
        """Return the sum of the phases per repeat."""
        return [sum(repeat) for repeat in zip(*self.seconds[side].values(), strict=True)]

    def ratios(self, slower: str, faster: str) -> list[float]:
        """Return slower / faster per repeat."""
        return [a / b for a, b in zip(self.totals(slower), self.totals(faster), strict=True)]


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


def side_by_side(
    shape: Shape,
    n_clients: int,
    repeats: int = 5,
    *,
    encodings: Sequence[Encoding] = ("int8",),
    deployed: bool = False,
) -> SideBySide:
    """Check all sides, then time them in turn.

    Args:
        shape: of model and adapters.
        n_clients: clients.
        repeats: of every side.
        encodings: of our payloads.
        deployed: also through flwr's own processes, which takes minutes a repeat at the large shape.

    Raises:
        PeerMissing: flwr's environment cannot be made; one line with the remedy.
        NotEqual: a side computes something else.
    """
    with ExitStack() as stack:
        federation, deltas, paths = stack.enter_context(scene(shape, n_clients))
        scratch = paths[0].parent
        flwr = stack.enter_context(Worker("flwr", paths))
        check_ours(federation, deltas)
        factors, share = _check_flwr(flwr, federation, deltas, paths)
        sides: dict[str, Callable[[], dict[str, float]]] = {
            f"fednested {encoding}": lambda encoding=encoding: federation.run(deltas, encoding).seconds
            for encoding in encodings
        }
        sides |= {
            "flwr in one process": lambda: flwr.ask("fedavg")["seconds"],
            "dense formation": lambda: _dense_seconds(deltas),
        }
        absent: dict[str, str] = {}
        try:
            nvflare = stack.enter_context(Worker("nvflare", paths))
            nvflare.ask("fedavg")
            check_averages(deltas, averages_of(nvflare, scratch / "nvflare.npz"), shape.n_tensors)
            sides["NVFlare averaging"] = lambda: nvflare.ask("fedavg")["seconds"]
        except PeerMissing as error:
            absent["NVFlare averaging"] = str(error)
        if deployed:
            deployment = stack.enter_context(Deployment(paths))
            sides["flwr deployed"] = lambda: round_seconds(deployment.round(), shape)
        seconds: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in sides}
        for _ in range(repeats):
            for side, measure in sides.items():
                for phase, took in measure().items():
                    seconds[side][phase].append(took)
        sent_bytes = {
            f"fednested {encoding}": federation.run(deltas[:1], encoding).sent_bytes for encoding in encodings
        }
        return SideBySide(
            seconds={side: dict(phases) for side, phases in seconds.items()},
            sent_bytes=sent_bytes | {"flwr in one process": flwr.ask("fedavg")["bytes"]},
            factor_error=factors,
            int8_share=share,
            absent=absent,
        )


def round_seconds(done: dict[str, float], shape: Shape) -> dict[str, float]:
    """Return the seconds of a deployed round that aggregated every tensor.

    Raises:
        NotEqual: it did not.
    """
    if done["tensors"] != shape.n_tensors:
        raise NotEqual(f"flwr's round aggregated {done['tensors']} tensors of {shape.n_tensors}")
    return {phase: done[phase] for phase in ("transport", "aggregate")}


def _check_flwr(
    flwr: Worker, federation: Federation, deltas: Sequence[Delta], paths: Sequence[Path]
) -> tuple[float, float]:
    """Check flwr's averages, and one client alone against ours; returns (factor error, share of the int8 bound)."""
    shape, scratch = federation.shape, paths[0].parent
    flwr.ask("fedavg")
    averages = averages_of(flwr, scratch / "flwr.npz")
    check_averages(deltas, averages, shape.n_tensors)
    with Worker("flwr", paths[:1]) as alone:
        alone.ask("fedavg")
        share = check_one_client(federation, deltas[0], averages_of(alone, scratch / "alone.npz"))
    return factor_error(deltas, averages, shape), share


def _dense_seconds(deltas: Sequence[Delta]) -> dict[str, float]:
    began = time.perf_counter()
    dense_mean(deltas)
    return {"aggregate": time.perf_counter() - began}


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


def nans(federation: Federation, deltas: Sequence[Delta]) -> tuple[int, list[str]]:
    """Fold with one client that sends NaN; returns (NaN in the new model, reasons of refusal)."""
    *honest, last = deltas
    name = list(federation.signers)[len(honest)]
    done = federation.run(honest, beside=[federation.broken(name, last)])
    found = sum(
        int(np.isnan(read_slice(key, digest, federation.blobs)[SLICE_TENSOR]).sum())
        for key, digest in done.candidate.blobs.items()
        if key != "core/rest"
    )
    return found, [refused.reason for refused in done.admission.refused]


def dense_mean(deltas: Sequence[Delta]) -> dict[str, np.ndarray]:
    """Form every update of every expert and average, fp32: what a peer does that averages updates, not factors."""
    return {
        name: sum(d.spec.scale / len(deltas) * (d.factors[name].lora_b @ d.factors[name].lora_a) for d in deltas)
        for name in deltas[0].factors
    }


def _rounding(factor: np.ndarray, axis: int) -> float:
    """Return the most that int8 moves a factor, Frobenius."""
    return float(np.sqrt((factor.shape[axis] * (np.abs(factor).max(axis=axis) / INT8_STEPS) ** 2).sum()))

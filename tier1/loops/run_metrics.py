"""Step metrics of core updates on their way to the registry: into a file while training, from there when it is done.

    home/dense/run-<digest>.metrics.jsonl        a row per measured step, appended by rank 0
    home/dense/run-<digest>.metrics.shown.jsonl  the same, when the registry has it

So training never waits for a server: neither one that is away, nor one that its container cannot reach. What a registry
did not take is offered again whenever the views of the chain are repaired, by whichever task does that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from fednested_lib.errors import FednestedError
from tier1.federation import Federation
from tier1.governance.ports import TrainingRun
from tier1.versions.manifest import DenseUpdate

log = structlog.get_logger()

SUFFIX, SHOWN = ".metrics.jsonl", ".metrics.shown.jsonl"


def metrics_writer(path: Path) -> Callable[[Mapping[str, float]], None]:
    """Return what appends a row to ``path``; a disk that refuses costs rows, never the run."""

    def write(row: Mapping[str, float]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            log.warning("core.metrics_lost", step=row["step"], reason=str(error))

    return write


def show_runs(fed: Federation) -> None:
    """Give the registry the steps of every finished core update that it does not have; what it refuses stays."""
    for path in sorted((fed.home / "dense").glob(f"run-*{SUFFIX}")):
        done = path.with_name(path.name.removesuffix(SUFFIX) + ".json")
        try:
            if not done.exists():
                continue
            run = _run(path, DenseUpdate.model_validate(json.loads(done.read_bytes())["update"]))
        except (OSError, ValueError, KeyError) as error:
            log.warning("core.metrics_unreadable", file=path.name, reason=str(error))
            continue
        try:
            fed.registry.record_run(run)
            path.replace(path.with_name(path.name.removesuffix(SUFFIX) + SHOWN))
        except (FednestedError, ImportError, OSError, ValueError, KeyError) as error:
            # a dead server would cost its time-out for every run that waits
            log.warning("core.metrics_waiting", file=path.name, reason=str(error))
            return


def _run(path: Path, update: DenseUpdate) -> TrainingRun:
    return TrainingRun(
        update_id=update.update_id,
        name=update.run_id,
        base_version=update.base_version,
        dataset_digest=update.dataset_digest,
        trainer=update.trainer,
        steps=_rows(path),
    )


def _rows(path: Path) -> list[dict[str, float]]:
    """Return the rows by step; of a step that was taken again after a failure the later one, torn lines left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            found[row["step"]] = row
        except (ValueError, TypeError, KeyError):
            continue
    return [found[step] for step in sorted(found)]

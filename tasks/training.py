"""Tasks of the core update: may we, what do we train on, train, fold.

`train` is one process in an ordinary container; on several ranks it is one of `tasks/gpu/train.py`.
"""

from datetime import datetime, timedelta, timezone
from typing import NamedTuple

from flytekit import Resources, current_context, task

from images import specs
from tasks.decks import show
from tasks.errors import retry_recoverable
from tasks.federation import ConfigFile, opened
from tier1.loops.records import CandidateRef, DenseRef, PackedData, TrainingGrant


class Authorised(NamedTuple):
    """The permission, and the name under which this run trains and goes on after a failure."""

    grant: TrainingGrant
    run: str


@task(container_image=specs.control, requests=Resources(cpu="500m", mem="1Gi"), retries=3, timeout=timedelta(hours=1))
@retry_recoverable
def authorise(config: ConfigFile, run: str) -> Authorised:
    """Ask the policy whether this run may train on the governed datasets."""
    from tier1.loops.core_update import authorise_training

    run = run or execution_name()
    with opened(config) as fed:
        return Authorised(grant=authorise_training(fed, run), run=run)


@task(container_image=specs.tier1, requests=Resources(cpu="2", mem="4Gi"), retries=3, timeout=timedelta(hours=2))
@retry_recoverable
def pack(config: ConfigFile, grant: TrainingGrant) -> PackedData:
    """Validate the granted JSONL datasets and pack them into token rows; bad records are set aside."""
    from tier1.loops.core_update import pack_datasets

    with opened(config) as fed:
        return pack_datasets(fed, grant)


@task(container_image=specs.tier1, requests=Resources(cpu="4", mem="16Gi"), retries=2, timeout=timedelta(hours=24))
@retry_recoverable
def train(config: ConfigFile, data: PackedData, run: str) -> DenseRef:
    """Train core and experts from head and publish the signed dense delta on updates.tier1."""
    from tier1.loops.core_update import train_delta

    with opened(config) as fed:
        return train_delta(fed, data, run)


@task(
    container_image=specs.tier1,
    requests=Resources(cpu="2", mem="8Gi"),
    retries=3,
    timeout=timedelta(hours=1),
    enable_deck=True,
    deck_fields=(),
)
@retry_recoverable
def fold_core(config: ConfigFile, delta: DenseRef) -> CandidateRef:
    """Fold the dense delta into whatever head is now; the result is a candidate, and the deck names the run."""
    from tier1.loops.core_update import fold_dense
    from tier1.loops.reports import contributors_html

    with opened(config) as fed:
        candidate = fold_dense(fed, delta)
        show("Contributors", contributors_html(fed, candidate))
        return candidate


def execution_name() -> str:
    """Return a name of this execution that its retries share; local runs are all called `local` and get the time."""
    name = current_context().execution_id.name
    return f"local-{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%f}" if name == "local" else name

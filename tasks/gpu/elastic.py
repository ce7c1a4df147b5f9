"""A task on several ranks: torch elastic starts them, Flyte alone repeats them.

    a rank killed, a machine gone, a lost connection    recoverable: the next attempt goes on from the newest checkpoint
    what a rank raised for its user                     the task fails at once, with that rank's one line

torch elastic could restart ranks in place as well (`max_restarts`), but it would repeat errors that cannot pass, a NaN
at the same step each time, and hide what was lost from Flyte.
"""

from dataclasses import dataclass, field
from typing import Any

from flytekit.core.task import TaskPlugins
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException
from flytekit.types.file import FlyteFile
from flytekitplugins.kfpytorch import CleanPodPolicy, Elastic, RunPolicy
from flytekitplugins.kfpytorch.task import PytorchElasticFunctionTask

from fednested_lib import errors
from fednested_lib.errors import ContractError, FednestedError, TransportError
from tasks.errors import retry_recoverable

DEADLINE_S = 24 * 3600
PATIENCE_S = 900  # some pods have to pull the image first


def _run_policy() -> RunPolicy:
    return RunPolicy(clean_pod_policy=CleanPodPolicy.ALL, active_deadline_seconds=DEADLINE_S, backoff_limit=3)


@dataclass
class Ranks(Elastic):
    """Elastic with our choices; set `nnodes` and `nproc_per_node`.

    Ranks are spawned. To fork is quicker by some seconds, but a forked rank inherits a CUDA context it must not use,
    autograd's threads and OpenMP's pool, whose threads do not exist in it: it hangs once the parent has computed, as it
    has in a local run.
    """

    start_method: str = "spawn"
    monitor_interval: int = 1
    max_restarts: int = 0
    increase_shared_mem: bool = False
    rdzv_configs: dict[str, Any] = field(
        default_factory=lambda: {"timeout": PATIENCE_S, "join_timeout": PATIENCE_S, "read_timeout": PATIENCE_S}
    )
    run_policy: RunPolicy | None = field(default_factory=_run_policy)


class RanksTask(PytorchElasticFunctionTask):
    """Says in one line which rank ended the run and why, and lets Flyte retry where that can help."""

    @retry_recoverable
    def execute(self, **kwargs: object) -> object:
        """Start the ranks of this node and wait for them."""
        # Spawned ranks get their inputs pickled, which FlyteFile["yaml"] does not admit; fetched once serves them all.
        files = {name: FlyteFile(value.download()) for name, value in kwargs.items() if isinstance(value, FlyteFile)}
        try:
            return super().execute(**kwargs | files)
        except (FlyteUserRuntimeException, FlyteRecoverableException) as error:
            ended = _ranks_error(error)
            if ended is None:  # it came about before or after the ranks
                raise
            rank, failure = ended.get_first_failure()
            recoverable = isinstance(error, FlyteRecoverableException)
            raise _told(rank, failure, recoverable, run=str(kwargs.get("run", ""))) from None


def _ranks_error(error: BaseException | None) -> Any:
    """Return torch elastic's error that led to this one, wherever flytekit has put it; None if there is none."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    while error is not None and not isinstance(error, ChildFailedError):
        error = error.__cause__ or error.__context__
    return error


def _told(rank: int, failure: Any, recoverable: bool, run: str) -> FednestedError:
    """Return the error of the whole run: that of the rank that was seen to fail first."""
    if failure.exitcode < 0:
        # Another batch or length of rows is another run, which no checkpoint of this one may go on in.
        return TransportError(
            f"rank {rank} was ended by {failure.signal_name()} (out of memory, or its machine was taken away): run it "
            f"again under the same name ({run}), it goes on from the newest checkpoint; if it ends so again, set "
            "core.micro_batch to fewer rows, core.activation_checkpointing to true, or train on more ranks"
        )
    said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    name, _, text = said.partition(": ")
    if recoverable:
        return TransportError(text)
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, FednestedError)):
        return FednestedError(f"rank {rank} failed: {said}")
    return kind("rank_failed", text) if issubclass(kind, ContractError) else kind(text)


TaskPlugins.register_pythontask_plugin(Ranks, RanksTask)

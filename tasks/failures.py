"""What runs when a workflow failed: a handler per workflow, for Flyte gives it the workflow's inputs and not its name.

A handler never fails: its own error would stand in the place of the one that it reports, in Flyte as in a local run.
"""

import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import structlog
from flytekit import PythonFunctionTask, Resources, current_context
from flytekit.core.base_task import TaskMetadata
from flytekit.core.promise import Promise
from flytekit.types.error.error import FlyteError

from images import specs
from tasks.federation import ConfigFile, opened


class Handler(PythonFunctionTask):
    """A task that flytekit, in a local run, calls with the very promises that the failed workflow was called with.

    The workflow's call resolved `x.field` among them in place; to resolve it once more would fail, and that error would
    be seen in place of the workflow's.
    """

    def __call__(self, *args: object, **kwargs: object) -> object:
        return super().__call__(*args, **{name: _resolved(value) for name, value in kwargs.items()})


def _resolved(value: object) -> object:
    if isinstance(value, Promise) and value.is_ready and value.attr_path:
        return Promise(value.var, value.val)
    return value


def handler(body: Callable[..., None]) -> Handler:
    """Make a handler; not with `@task` and a task config of ours, which Flyte 2's migration refuses."""
    return Handler(
        task_config=None,
        task_function=body,
        container_image=specs.control,
        requests=Resources(cpu="500m", mem="1Gi"),
        metadata=TaskMetadata(retries=3, timeout=timedelta(minutes=10)),
    )


@handler
def core_update_failed(config: ConfigFile, run: str, err: FlyteError | None = None) -> None:
    """Record that a core update failed."""
    _record("core_update", config, err)


@handler
def aggregate_experts_failed(config: ConfigFile, err: FlyteError | None = None) -> None:
    """Record that an aggregation failed."""
    _record("aggregate_experts", config, err)


@handler
def aggregate_experts_sharded_failed(config: ConfigFile, shards: int, err: FlyteError | None = None) -> None:
    """Record that a sharded aggregation failed, or that too few of its shards could be folded."""
    _record("aggregate_experts_sharded", config, err)


@handler
def evaluate_and_promote_failed(
    config: ConfigFile, candidate: str, channel: str, err: FlyteError | None = None
) -> None:
    """Record that an evaluation or promotion failed, or that nobody answered its gate in time."""
    _record("evaluate_and_promote", config, err)


@handler
def broadcast_failed(config: ConfigFile, err: FlyteError | None = None) -> None:
    """Record that a broadcast failed."""
    _record("broadcast", config, err)


@handler
def nested_round_failed(config: ConfigFile, core: bool, channel: str, err: FlyteError | None = None) -> None:
    """Record that a round failed outside the loops that it turns."""
    _record("nested_round", config, err)


@handler
def sensed_round_failed(config: ConfigFile, channel: str, err: FlyteError | None = None) -> None:
    """Record that a sensed round failed outside the loops that it turns."""
    _record("sensed_round", config, err)


@handler
def data_engine_failed(config: ConfigFile, err: FlyteError | None = None) -> None:
    """Record that a turn of the data engine failed."""
    _record("data_engine", config, err)


@handler
def data_engine_regions_failed(config: ConfigFile, err: FlyteError | None = None) -> None:
    """Record that a turn of the data engine failed, or that too few regions could be heard."""
    _record("data_engine_regions", config, err)


@handler
def evaluate_suites_failed(config: ConfigFile, candidate: str, err: FlyteError | None = None) -> None:
    """Record that too few suites could be measured."""
    _record("evaluate_suites", config, err)


def _record(workflow: str, config: ConfigFile, err: FlyteError | None) -> None:
    raised = sys.exc_info()[1]  # a local run calls the handler while the error is in flight; in a pod there is none
    node = err.failed_node_id if err and raised is None else ""  # in a local run it is the handler's own
    try:
        from tier1.loops.failures import error_class, node_name, record_failure

        with opened(config) as fed:
            record_failure(
                fed,
                workflow=workflow,
                node=node_name(node),
                execution=_execution(raised),
                error=error_class(err.message if err else "", raised),
            )
    except Exception as error:
        structlog.get_logger().warning("failure.unrecorded", workflow=workflow, error=type(error).__name__)


def _execution(raised: BaseException | None) -> str:
    """Return a name that all handlers of one failure see; local runs are all called `local`: there the error has it."""
    name = current_context().execution_id.name
    if name != "local":
        return name
    if not hasattr(raised, "execution"):
        raised.execution = f"local-{datetime.now(timezone.utc):%Y%m%dt%H%M%S-%f}"
    return raised.execution

"""What is launched, under which name, and the port behind which Flyte is.

    name = "task-" + first 20 hex digits of SHA-256(federation / task id)

The name is the whole of exactly-once: Flyte admits one execution of a name in a project and domain, for ever. So a task
that comes twice, or a launch whose answer was lost, meets its own execution; the kind is no part of the name, so an id
that is used for two kinds shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fednested_lib.errors import ContractError
from fednested_lib.events import TrainingTask
from fednested_lib.signing import sha256_hex

# Kind of task → launch plan. Both plans have a schedule too, and one concurrency policy bounds both ways of launching.
ROUTES = {"aggregate": "nested_round_fast", "core_update": "nested_round_nightly"}


@dataclass(frozen=True, kw_only=True)
class Order:
    """One execution to be.

    Args:
        name: of the execution; [a-z][a-z0-9-]*, at most 63 characters.
        plan: launch plan, whose fixed inputs are all the inputs there are.
        kind: of the task; a label of the execution.
        digest: SHA-256 of the task's bytes; an annotation of the execution, which shows a task id that was used twice.
    """

    name: str
    plan: str
    kind: str
    digest: str


class Launcher(Protocol):
    """What the trigger asks of Flyte."""

    def launch(self, order: Order) -> bool:
        """Make sure that the execution `order.name` exists.

        Returns:
            True once it is confirmed to exist, launched now or before; False while the launch plan's concurrency policy
            skips it.

        Raises:
            TransportError: Flyte does not answer, or the launch plan is not active (yet); try again later.
            ContractError: this order can never be launched: reason ``launch_refused`` or ``task_id_reused``.
        """


def order_of(task: TrainingTask, routes: Mapping[str, str]) -> Order:
    """Return the execution that a task asks for.

    Raises:
        ContractError: reason ``unknown_kind``.
    """
    if task.kind not in routes:
        raise ContractError(
            "unknown_kind",
            f"kind of task {task.task_id} must be one of {', '.join(sorted(routes))}, got {task.kind}: "
            "correct the sender, or give the trigger a --route",
        )
    name = f"task-{sha256_hex(f'{task.federation}/{task.task_id}'.encode())[:20]}"
    return Order(name=name, plan=routes[task.kind], kind=task.kind, digest=sha256_hex(task.to_bytes()))

"""The launcher over FlyteRemote: registered, active launch plans of one project and domain.

Flyte answers ALREADY_EXISTS both when the name is taken and when the concurrency policy skips a launch, so the
execution is fetched then, and a skip shows as a name that does not exist. Hence the calls of FlyteRemote's client and
not its `execute`, which hides which of the two calls found nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fednested_lib.errors import ContractError, TransportError
from services.flyte import calls, connect_remote, details
from services.trigger.launch import Order

if TYPE_CHECKING:
    from flytekit.remote import FlyteRemote

DIGEST_ANNOTATION = "fednested/task-sha256"


class FlyteLauncher:
    """Launches orders as executions.

    Args:
        remote: connected to the project and domain in which the launch plans are active.
    """

    def __init__(self, remote: FlyteRemote):
        self._remote = remote

    def launch(self, order: Order) -> bool:
        """See `Launcher.launch`."""
        from flytekit.exceptions.user import FlyteInvalidInputException

        try:
            with calls(f"Flyte did not launch {order.name}"):
                found = self._digest_of_execution(order)
        except FlyteInvalidInputException as error:
            raise ContractError("launch_refused", f"Flyte refuses {order.name}: {details(error)}") from error
        if found is not None and found != order.digest:
            raise ContractError(
                "task_id_reused",
                f"execution {order.name} is for a task with digest {found}, this one has {order.digest}: "
                "give every task an id of its own",
            )
        return found is not None

    def _digest_of_execution(self, order: Order) -> str | None:
        """Create the execution unless it exists; return the digest it carries, None while the policy skips it."""
        from flytekit.exceptions.user import FlyteEntityAlreadyExistsException, FlyteEntityNotExistException
        from flytekit.models.core.identifier import WorkflowExecutionIdentifier

        project, domain, client = self._remote.default_project, self._remote.default_domain, self._remote.client
        try:
            self._create(order)
        except FlyteEntityAlreadyExistsException:
            pass
        except FlyteEntityNotExistException as error:
            raise TransportError(
                f"Flyte has no active launch plan {order.plan} in {project}/{domain} ({details(error)}): register the "
                f"project and the plan, then `pyflyte launchplan {order.plan} VERSION --activate`"
            ) from error
        else:
            return order.digest
        try:
            execution = client.get_execution(WorkflowExecutionIdentifier(project, domain, order.name))
        except FlyteEntityNotExistException:
            return None
        return execution.spec.annotations.values.get(DIGEST_ANNOTATION, "")

    def _create(self, order: Order) -> None:
        from flytekit.models.common import Annotations, Labels, NamedEntityIdentifier
        from flytekit.models.execution import ExecutionMetadata, ExecutionSpec, NotificationList
        from flytekit.models.literals import LiteralMap

        project, domain, client = self._remote.default_project, self._remote.default_domain, self._remote.client
        plan = client.get_active_launch_plan(NamedEntityIdentifier(project, domain, order.plan))
        spec = ExecutionSpec(
            plan.id,
            ExecutionMetadata(ExecutionMetadata.ExecutionMode.MANUAL, "", 0),  # admin fills in who it was
            notifications=NotificationList([]),  # none of its own: the launch plan's
            labels=Labels({"fednested-trigger": order.kind}),
            annotations=Annotations({DIGEST_ANNOTATION: order.digest}),
        )
        client.create_execution(project, domain, order.name, spec, LiteralMap({}))


def connect(project: str, domain: str) -> FlyteLauncher:
    """Return a launcher for the Flyte that flytekit's own configuration names."""
    return FlyteLauncher(connect_remote(project, domain))

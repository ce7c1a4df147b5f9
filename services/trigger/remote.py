"""The launcher over FlyteRemote: registered, active launch plans of one project and domain.

Flyte answers ALREADY_EXISTS both when the name is taken and when the concurrency policy skips a launch; FlyteRemote
then fetches the execution, so a skip shows as a name that does not exist. Endpoint and credentials are flytekit's own
(`FLYTE_PLATFORM_URL`, `~/.flyte/config.yaml`, …).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fednested_lib.errors import ContractError, TransportError
from services.trigger.launch import Order

if TYPE_CHECKING:
    from flytekit.remote import FlyteRemote

CALL_TIMEOUT_S = 20.0
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
        from flytekit.clients.grpc_utils.deadline_interceptor import scoped_grpc_deadline
        from flytekit.exceptions.base import FlyteException
        from flytekit.exceptions.user import FlyteEntityNotExistException, FlyteInvalidInputException

        try:
            with scoped_grpc_deadline(CALL_TIMEOUT_S):
                execution = self._execute(order)
        except FlyteEntityNotExistException:
            return False
        except FlyteInvalidInputException as error:
            raise ContractError("launch_refused", f"Flyte refuses {order.name}: {_details(error)}") from error
        except FlyteException as error:
            raise TransportError(
                f"Flyte did not launch {order.name} ({type(error).__name__}: {_details(error)}): see that its admin "
                "runs, and FLYTE_PLATFORM_URL and the credentials"
            ) from error
        found = execution.spec.annotations.values.get(DIGEST_ANNOTATION)
        if found != order.digest:
            raise ContractError(
                "task_id_reused",
                f"execution {order.name} is for a task with digest {found}, this one has {order.digest}: "
                "give every task an id of its own",
            )
        return True

    def _execute(self, order: Order):
        from flytekit.core.options import Options
        from flytekit.models.common import Annotations, Labels

        plan = self._remote.fetch_active_launchplan(name=order.plan)
        if plan is None:
            place = f"{self._remote.default_project}/{self._remote.default_domain}"
            raise TransportError(
                f"launch plan {order.plan} has no active version in {place}: register it, then "
                f"`pyflyte launchplan {order.plan} VERSION --activate`"
            )
        options = Options(
            labels=Labels({"fednested-trigger": order.kind}), annotations=Annotations({DIGEST_ANNOTATION: order.digest})
        )
        return self._remote.execute(plan, inputs={}, execution_name=order.name, options=options)


def connect(project: str, domain: str) -> FlyteLauncher:
    """Return a launcher for the Flyte that flytekit's own configuration names."""
    from flytekit.configuration import Config
    from flytekit.remote import FlyteRemote

    return FlyteLauncher(FlyteRemote(Config.auto(), default_project=project, default_domain=domain))


def _details(error: BaseException) -> str:
    """Return the server's words, on one line."""
    cause = error.__cause__
    text = cause.details() if hasattr(cause, "details") else str(error)
    return " ".join((text or "no details").split())

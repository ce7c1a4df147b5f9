"""The gates that wait for a decision in one project and domain, over FlyteAdmin's signals.

Propeller creates a gate's signal when the gate begins to wait, some seconds after the report; a signal without a value
is a gate that waits. Admin lets a later SetSignal overwrite an earlier one, so what was answered is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fednested_lib.errors import ConfigError, GovernanceError
from services.flyte import calls, connect_remote, details, is_configured
from tier1.loops.records import GATE

if TYPE_CHECKING:
    from flyteidl.admin.signal_pb2 import Signal
    from flytekit.remote import FlyteRemote

PAGE = 100


class FlyteGates:
    """Gates called `GATE` in the executions of one project and domain.

    Args:
        remote: connected to that project and domain.
    """

    def __init__(self, remote: FlyteRemote):
        self._remote = remote
        self._place = f"{remote.default_project}/{remote.default_domain}"

    def waiting(self) -> list[str]:
        """Return the names of the running executions whose gate waits.

        Raises:
            ConfigError: Flyte refuses, as it does for a project that it does not know.
            TransportError: Flyte does not answer.
        """
        from flytekit.exceptions.user import FlyteEntityNotExistException, FlyteInvalidInputException

        try:
            with calls(f"Flyte did not list the gates of {self._place}"):
                return [name for name in self._running() if any(_is_open(signal) for signal in self._of(name))]
        except (FlyteEntityNotExistException, FlyteInvalidInputException) as error:
            raise ConfigError(
                f"Flyte refuses to list the gates of {self._place}: {details(error)}: see --project and --domain"
            ) from None

    def answer(self, execution: str, token: str) -> None:
        """Send a decision token to the gate of one execution.

        Raises:
            GovernanceError: no such execution, or its gate does not wait.
            TransportError: Flyte does not answer; send the token again. If it had arrived and only the answer was lost,
                that ends with a GovernanceError, the gate has its answer, and changes nothing.
        """
        from flytekit.exceptions.user import FlyteEntityNotExistException, FlyteInvalidInputException

        try:
            with calls(f"Flyte did not take the decision for execution {execution}"):
                self._require_waiting(execution)
                self._remote.set_signal(GATE, execution, token, python_type=str)
        except FlyteEntityNotExistException:
            raise GovernanceError(
                f"execution {execution} is not in {self._place}: `fednested approvals list` names those that wait, "
                "--project and --domain say where"
            ) from None
        except FlyteInvalidInputException as error:
            raise GovernanceError(
                f"Flyte refuses the decision for execution {execution}: {details(error)}: list the gates again"
            ) from None

    def _require_waiting(self, execution: str) -> None:
        from flytekit.models.core.execution import WorkflowExecutionPhase
        from flytekit.models.core.identifier import WorkflowExecutionIdentifier

        remote = self._remote
        found = remote.client.get_execution(
            WorkflowExecutionIdentifier(remote.default_project, remote.default_domain, execution)
        )
        phase = WorkflowExecutionPhase.enum_to_string(found.closure.phase)
        signals = self._of(execution)
        if not all(_is_open(signal) for signal in signals):
            raise GovernanceError(
                f"gate {GATE} of execution {execution} has its answer, the execution is {phase}: a second one would "
                "overwrite it; `fednested tier1 status` shows what was decided"
            )
        if not signals or phase != "RUNNING":
            raise GovernanceError(
                f"gate {GATE} of execution {execution} does not wait, the execution is {phase}: if it runs, try again "
                "some seconds after its report; `fednested approvals list` names those that wait"
            )

    def _of(self, execution: str) -> list[Signal]:
        return [signal for signal in self._remote.list_signals(execution, limit=PAGE) if signal.id.signal_id == GATE]

    def _running(self) -> Iterator[str]:
        from flytekit.models.filters import Equal

        remote, token = self._remote, ""
        while True:
            page, token = remote.client.list_executions_paginated(
                remote.default_project,
                remote.default_domain,
                limit=PAGE,
                token=token,
                filters=[Equal("phase", "RUNNING")],
            )
            yield from (execution.id.name for execution in page)
            if not token:
                return


def _is_open(signal: Signal) -> bool:
    return not signal.HasField("value")


def connect_gates(project: str, domain: str) -> FlyteGates:
    """Return the gates of the Flyte that flytekit's configuration names.

    Raises:
        ConfigError: nothing names one.
    """
    if not is_configured():
        raise ConfigError("no Flyte is configured: set FLYTE_PLATFORM_URL (host:port), or write ~/.flyte/config.yaml")
    return FlyteGates(connect_remote(project, domain))

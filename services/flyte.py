"""Calls of FlyteAdmin, for the services that make some: where it is, how long a call may take, what a failure says.

Endpoint and credentials are flytekit's own (`FLYTE_PLATFORM_URL`, `~/.flyte/config.yaml`, …).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fednested_lib.errors import TransportError

if TYPE_CHECKING:
    from flytekit.models.launch_plan import LaunchPlan
    from flytekit.remote import FlyteRemote

CALL_TIMEOUT_S = 20.0


def connect_remote(project: str, domain: str) -> FlyteRemote:
    """Return the Flyte that flytekit's own configuration names; nothing is sent yet."""
    from flytekit.configuration import Config
    from flytekit.remote import FlyteRemote

    return FlyteRemote(Config.auto(), default_project=project, default_domain=domain)


def is_configured() -> bool:
    """Return whether anything names a Flyte; flytekit itself falls back on an address that is a sandbox's."""
    from flytekit.configuration.file import get_config_file

    return bool(os.environ.get("FLYTE_PLATFORM_URL")) or get_config_file(None) is not None


def registered_version(remote: FlyteRemote, plan: str) -> tuple[str, bool]:
    """Return the version of a launch plan, and whether it is active; the newest if none is, "" if none is registered.

    Raises:
        TransportError: no answer, or no login.
    """
    found, active = registered_plan(remote, plan)
    return (found.id.version if found else ""), active


def registered_plan(remote: FlyteRemote, plan: str) -> tuple[LaunchPlan | None, bool]:
    """Return a launch plan as it is registered, and whether it is active; the newest if none is.

    Raises:
        TransportError: no answer, or no login.
    """
    from flytekit.exceptions.user import FlyteEntityNotExistException
    from flytekit.models.common import NamedEntityIdentifier

    name = NamedEntityIdentifier(remote.default_project, remote.default_domain, plan)
    with calls(f"Flyte did not tell of launch plan {plan}"):
        try:
            return remote.client.get_active_launch_plan(name), True
        except FlyteEntityNotExistException:
            found, _ = remote.client.list_launch_plans_paginated(name, limit=1)
    return (found[0] if found else None), False


@contextmanager
def calls(failed: str) -> Iterator[None]:
    """Bound the calls of FlyteRemote's client inside this block, and name what keeps them from an answer.

    Args:
        failed: what did not happen, the beginning of the error's line.

    Raises:
        TransportError: no answer, or no login. What admin refuses or does not find passes as flytekit raised it.
    """
    import grpc
    from flytekit.clients.auth.exceptions import AccessTokenNotFoundError, AuthenticationError, AuthenticationPending
    from flytekit.clients.grpc_utils.deadline_interceptor import scoped_grpc_deadline
    from flytekit.exceptions.base import FlyteException
    from flytekit.exceptions.user import FlyteEntityNotExistException, FlyteInvalidInputException

    refused_login = (AccessTokenNotFoundError, AuthenticationError, AuthenticationPending)
    try:
        with scoped_grpc_deadline(CALL_TIMEOUT_S):
            yield
    except (FlyteInvalidInputException, FlyteEntityNotExistException):
        raise
    except (FlyteException, *refused_login, grpc.RpcError, OSError) as error:  # OSError: those of requests, too
        raise TransportError(
            f"{failed} ({type(error).__name__}: {details(error)}): see that its admin "
            "runs, and FLYTE_PLATFORM_URL and the credentials"
        ) from error


def details(error: BaseException) -> str:
    """Return the server's words, on one line."""
    cause = error.__cause__
    text = cause.details() if hasattr(cause, "details") else str(error)
    return " ".join((text or "no details").split())

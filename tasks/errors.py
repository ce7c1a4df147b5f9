"""What Flyte may retry: only an error that can pass by itself. The one place where our errors meet flytekit's.

    TransportError, ChainConflict      recoverable: the task's `retries` apply
    every other FednestedError         the user has to do something: the task fails at once, with its own line
    anything else                      a bug: the task fails at once, with its traceback

The console shows the class of the error as its code (`PolicyDenied` instead of `USER:RuntimeError`). A local run is
started by our own command, which needs class and message without flytekit's traceback boxes around them: it names a
file for them in `FEDNESTED_ERROR_FILE`.
"""

import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from flytekit.exceptions.user import FlyteRecoverableException

from fednested_lib.errors import ChainConflict, FednestedError, TransportError

ERROR_FILE = "FEDNESTED_ERROR_FILE"
P = ParamSpec("P")
R = TypeVar("R")


class Recoverable(FlyteRecoverableException):
    """An error that another attempt may not meet; its text is the original's, once (flytekit repeats the cause)."""

    def __str__(self) -> str:
        return str(self.args[0])


def retry_recoverable(body: Callable[P, R]) -> Callable[P, R]:
    """Sort the errors of a task's body for Flyte; goes between `@task` and the function."""

    @wraps(body)
    def shell(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return body(*args, **kwargs)
        except (TransportError, ChainConflict) as error:
            _tell(error)
            recoverable = Recoverable(str(error))
            recoverable.error_code = type(error).__name__
            raise recoverable from error
        except FednestedError as error:
            _tell(error)
            error.error_code = type(error).__name__
            raise

    return shell


def _tell(error: FednestedError) -> None:
    if path := os.environ.get(ERROR_FILE):
        told = {"type": type(error).__name__, "message": str(error), "reason": getattr(error, "reason", None)}
        Path(path).write_text(json.dumps(told), encoding="utf-8")

"""Which errors Flyte retries, and what a person reads."""

from __future__ import annotations

import pytest
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException

from fednested_lib import errors
from tasks.errors import retry_recoverable

LINE = "log.bootstrap = 127.0.0.1:1 does not answer within 20 s: start the broker"


def raising(error: Exception):
    @retry_recoverable
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize("kind", [errors.TransportError, errors.ChainConflict])
def test_what_may_pass_is_retried_with_its_own_line(kind: type[errors.FednestedError]) -> None:
    """A dead broker or a lost race is recoverable; the line appears once, and the cause keeps the exit code."""
    with pytest.raises(FlyteRecoverableException) as raised:
        raising(kind(LINE))()
    assert str(raised.value) == LINE
    assert isinstance(raised.value.__cause__, kind)
    assert FlyteUserRuntimeException(raised.value).error_code == kind.__name__


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError("core.steps must be >= 1, got 0: set core.steps"),
        errors.PolicyDenied("denied"),
        errors.ChainCorrupt("altered"),
        errors.SnapshotError("missing_blob", "blob ab is missing"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_person_must_mend_is_not_retried(error: errors.FednestedError) -> None:
    """A retry would not change a wrong configuration or a denial: the error passes as it is, named for the console."""
    with pytest.raises(type(error)) as raised:
        raising(error)()
    assert raised.value is error
    assert not isinstance(raised.value, FlyteRecoverableException)
    assert FlyteUserRuntimeException(raised.value).error_code == type(error).__name__


def test_a_bug_keeps_its_own_type() -> None:
    """Only our errors are sorted; a programming error is not dressed up as one of them."""
    with pytest.raises(KeyError):
        raising(KeyError("x"))()

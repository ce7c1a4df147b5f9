"""How a service runs as a process: events as JSON lines on standard error, an error of ours as one line, its code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import structlog

from fednested_lib.errors import FednestedError


def run_as_process(name: str, service: Callable[[], object]) -> None:
    """Run a service until it returns.

    Args:
        name: stands before an error's line.
        service: what to run; it parses the command line itself.

    Raises:
        SystemExit: with the code of an error of ours, after its line.
    """
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    try:
        service()
    except FednestedError as error:
        sys.stderr.write(f"{name}: {error}\n")
        raise SystemExit(error.exit_code) from None

"""A workflow that failed: who may want to know is told once, in words that can carry no data.

The event names workflow, node, execution and error class; what the error said stays in Flyte's console and in the
task's log. It is on disk under `home`/failures before it is announced, so that a log which does not answer loses
nothing: the next failure's handler announces it. Neither head nor champion is touched.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import structlog

from fednested_lib.blobs import create_exclusive
from fednested_lib.errors import EnvelopeError, FednestedError, TransportError
from fednested_lib.events import ERRORS, NODE, WorkflowFailed, parse_event
from tier1.federation import Federation

PATIENCE_S = 5.0  # a log that was the reason of the failure is not waited for twice
# What propeller says (flytepropeller 1.16: nodes/executor.go, dynamic_workflow.go, workflow/executor.go) when the
# time-out of a gate or a task is over; when twice that is over, in a dynamic and elsewhere.
TIMED_OUT = re.compile(
    r"\[\d+/\d+\] currentAttempt done\. Last Error: "
    r"(USER::task execution timeout \[[0-9hms.µn]+\] expired|UNKNOWN::Dynamic workflow failed)|Timeout in node"
)
NAMED = re.compile(rf"^\s*(?:fednested_lib\.errors\.)?({'|'.join(ERRORS)}): ", re.MULTILINE)

log = structlog.get_logger()


def record_failure(fed: Federation, *, workflow: str, node: str, execution: str, error: str) -> None:
    """Keep and announce one failure, once per execution: of nested workflows the innermost speaks, it is first.

    Raises:
        ValidationError: of pydantic; a word is not one of the event's.
        StorageError: `home` cannot be written.
    """
    event = WorkflowFailed(
        federation=fed.config.federation, workflow=workflow, node=node, execution=execution, error=error
    )
    directory = fed.home / "failures"
    directory.mkdir(parents=True, exist_ok=True)
    if create_exclusive(directory / f"{execution}.json", event.to_bytes()):
        log.warning("workflow.failed", workflow=workflow, node=node, execution=execution, error=error)
        _announce_kept(fed, directory)


def _announce_kept(fed: Federation, directory: Path) -> None:
    kept = [path for path in sorted(directory.glob("*.json")) if not path.with_suffix(".announced").exists()]
    settings = fed.config.log.model_copy(update={"timeout_s": min(PATIENCE_S, fed.config.log.timeout_s)})
    impatient = replace(fed, config=fed.config.model_copy(update={"log": settings}))
    try:
        for path in kept:
            _announce(impatient, path)
    except TransportError:
        log.warning("failure.kept", directory=str(directory), next="the next failure's handler announces it")
    finally:
        impatient.close()


def _announce(fed: Federation, path: Path) -> None:
    try:
        event = parse_event(path.read_bytes())
    except EnvelopeError as error:  # of a release that had other words; what was kept after it can be told
        log.warning("failure.unreadable", path=str(path), error=str(error))
        return
    fed.announce(event, key=b"failure")
    create_exclusive(path.with_suffix(".announced"), b"")


def node_name(node: str) -> str:
    """Return a node's id, or nothing where the event could not carry it: Flyte names nodes, and a failure is told."""
    return node if re.fullmatch(NODE, node) else ""


def error_class(message: str, raised: BaseException | None = None) -> str:
    """Return the class of an error, a word of `ERRORS`.

    Args:
        message: what Flyte hands to a failure handler: in a pod's error the class stands before the text.
        raised: the exception itself, in a local run.
    """
    while raised is not None and not isinstance(raised, FednestedError):
        raised = raised.__cause__
    if raised is not None:
        return type(raised).__name__ if type(raised).__name__ in ERRORS else "Other"
    if TIMED_OUT.fullmatch(message.strip()):
        return "Timeout"
    named = NAMED.findall(message)
    return named[-1] if named else "Other"

"""`python -m services.trigger`: run the trigger until SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import structlog
import typer

from fednested_lib.errors import ConfigError
from services.shell import run_as_process
from services.trigger.inbox import KafkaPositions, group_of
from services.trigger.launch import ROUTES
from services.trigger.service import Trigger

DEFAULT_ROUTES = [f"{kind}={plan}" for kind, plan in ROUTES.items()]


def run(
    config: Path = typer.Option(..., help="tier1.yaml: the log, the federation's name and its trusted keys."),
    project: str = typer.Option("fednested", help="Flyte project of the launch plans."),
    domain: str = typer.Option("development", help="Flyte domain of the launch plans."),
    route: list[str] = typer.Option(DEFAULT_ROUTES, help="kind=launch plan; repeat for more."),
    group: str = typer.Option(
        None,
        help="Kafka group whose committed offsets say where to go on; "
        "default: fednested-trigger.<federation>.<project>.<domain>",
    ),
    poll_s: float = typer.Option(1.0, min=0.01, help="Seconds between two looks at the log."),
) -> None:
    """Launch one Flyte execution per task on tasks.training, until SIGTERM."""
    from services.trigger.remote import connect
    from tier1.config import load_tier1
    from tier1.federation import open_log

    settings, routes = load_tier1(config), _routes(route)
    stop = _told_to_stop()
    group = group or group_of(settings.federation, project, domain)
    log, positions = open_log(settings.log), KafkaPositions(settings.log.servers(), group=group)
    trigger = Trigger(
        log,
        positions,
        connect(project, domain),
        federation=settings.federation,
        trusted=frozenset(settings.identity.trusted),
        routes=routes,
    )
    structlog.get_logger().info(
        "trigger.started", log=settings.log.servers(), group=group, project=project, domain=domain
    )
    try:
        trigger.run(stop, poll_s=poll_s)
    finally:
        positions.close()
        log.close()


def _told_to_stop() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set; from a thread, because a handler could meet the event's own lock."""
    stop = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: threading.Thread(target=stop.set).start())
    return stop


def _routes(given: list[str]) -> dict[str, str]:
    wrong = [text for text in given if not all(text.partition("="))]
    if wrong:
        raise ConfigError(
            f"--route must be kind=launch-plan, got {wrong[0]}: for example core_update=nested_round_nightly"
        )
    return dict(text.split("=", 1) for text in given)


def main() -> None:
    """Parse the command line and serve."""
    run_as_process("trigger", lambda: typer.run(run))


if __name__ == "__main__":
    main()

"""`fednested approvals …`: what waits for a decision, and the decision as a signed token, printed or sent."""

from __future__ import annotations

from pathlib import Path

import typer

from fednested_lib.errors import GovernanceError
from services.approvals.gates import connect_gates
from services.flyte import is_configured
from tier1.commands import CONFIG, issue_token
from tier1.federation import Federation, open_federation
from tier1.loops.evaluate_and_promote import waiting_versions

KEY = typer.Option(..., help="approver's key")
REASON = typer.Option("", help="why; one line")
EXECUTION = typer.Option(..., help="name of the execution whose gate waits; `list` shows it")
VERSION = typer.Option(None, help="version number; needed when several wait")
PROJECT = typer.Option("fednested", help="Flyte project")
DOMAIN = typer.Option("development", help="Flyte domain")

app = typer.Typer(help="Decisions of approvers.", no_args_is_help=True)


@app.command("list")
def list_waiting(config: Path = CONFIG, project: str = PROJECT, domain: str = DOMAIN) -> None:
    """List versions that wait for a decision and, where a Flyte is configured, the gates that wait for one."""
    for number, manifest in waiting_versions(open_federation(config)):
        typer.echo(f"version {number}  manifest {manifest}")
    if is_configured():
        for execution in connect_gates(project, domain).waiting():
            typer.echo(f"gate of execution {execution}  in {project}/{domain}")


@app.command("token")
def token(
    verdict: str = typer.Argument(help="approve or reject"),
    config: Path = CONFIG,
    version: int = typer.Option(..., help="version number"),
    key: Path = KEY,
    reason: str = REASON,
) -> None:
    """Print a signed decision token for the gate of one version."""
    typer.echo(issue_token(open_federation(config), version, verdict, key, reason))


@app.command("approve")
def approve(
    config: Path = CONFIG,
    execution: str = EXECUTION,
    key: Path = KEY,
    reason: str = REASON,
    version: int = VERSION,
    project: str = PROJECT,
    domain: str = DOMAIN,
) -> None:
    """Approve a version: sign a token and send it to the gate that waits on Flyte."""
    _send("approve", config, execution, key, reason, version, project, domain)


@app.command("reject")
def reject(
    config: Path = CONFIG,
    execution: str = EXECUTION,
    key: Path = KEY,
    reason: str = REASON,
    version: int = VERSION,
    project: str = PROJECT,
    domain: str = DOMAIN,
) -> None:
    """Reject a version: sign a token and send it to the gate that waits on Flyte."""
    _send("reject", config, execution, key, reason, version, project, domain)


def _send(
    verdict: str, config: Path, execution: str, key: Path, reason: str, version: int | None, project: str, domain: str
) -> None:
    fed = open_federation(config)
    version = _the_waiting_one(fed) if version is None else version
    signed = issue_token(fed, version, verdict, key, reason)
    connect_gates(project, domain).answer(execution, signed)
    typer.echo(f"sent {verdict} of version {version} to execution {execution} in {project}/{domain}")


def _the_waiting_one(fed: Federation) -> int:
    numbers = [number for number, _ in waiting_versions(fed)]
    if not numbers:
        raise GovernanceError("no version waits for a decision: `fednested tier1 status` shows what was decided")
    if len(numbers) > 1:
        raise GovernanceError(
            f"{len(numbers)} versions wait ({', '.join(map(str, numbers))}), one is decided on at a time: "
            "name the one that the deck shows with --version"
        )
    return numbers[0]

"""The Flyte side of `fednested tier1 doctor`: one JSON finding per line.

    python -m services.examine_flyte --project fednested --domain development [--connector host:port]

Endpoint and credentials are flytekit's own. Only reading calls are made: GetVersion, ListProjects, GetDomains,
ListLaunchPlans, GetActiveLaunchPlan, GetWorkflow, ListExecutions, GetProjectDomainAttributes; of the connector,
ListAgents. What Kubernetes alone knows is a warning with the command that shows it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from fednested_lib.finding import Finding, judge, look
from services.examine_connector import connector
from services.examine_registered import account, configuration, flight, quota
from services.flyte import calls, connect_remote, is_configured, registered_plan
from services.trigger.launch import ROUTES

if TYPE_CHECKING:
    from flytekit.remote import FlyteRemote

# The plans of launchplans/, which services cannot import; a test holds them equal.
PLANS = (*ROUTES.values(), "sensed_round", "data_engine_hourly", "core_update_8_gpu_nightly")
REGISTER = "make register-dev or register-prod"
CONNECTOR = typer.Option("", "--connector", help="host:port of the connector service")


def examine(project: str, domain: str) -> Iterator[Finding]:
    """Is there a Flyte, does it know the project and domain, and which plans are registered and active?"""
    if not is_configured():
        yield Finding(
            what="flyte endpoint",
            state="bad",
            value="nothing names one",
            remedy="set FLYTE_PLATFORM_URL, or write ~/.flyte/config.yaml with `flytectl config init`",
        )
        return
    remote = connect_remote(project, domain)
    client = remote.client
    with calls("Flyte was not examined"):
        version = client.get_control_plane_version()
        yield Finding(what="flyte", state="ok", value=f"{os.environ.get('FLYTE_PLATFORM_URL', '')} {version}".strip())
        projects = sorted(each.id for each in client.list_projects_paginated(limit=100)[0])
        domains = sorted(each.id for each in client.get_domains())
    yield judge(
        "flyte project",
        holds=project in projects and domain in domains,
        value=f"projects {', '.join(projects) or 'none'}; domains {', '.join(domains) or 'none'}",
        bound=f"{project}/{domain}",
        remedy=f"flytectl create project --id {project} --name {project}; domains are Flyte's own configuration",
    )
    if project in projects and domain in domains:
        yield from _registered(remote)


def _registered(remote: FlyteRemote) -> Iterator[Finding]:
    found = {name: registered_plan(remote, name) for name in plans_of(os.environ.get("FEDNESTED_REGIONS", ""))}
    for name, (plan, active) in found.items():
        yield _plan(remote, name, plan.id.version if plan else "", active)
    plans = {name: plan for name, (plan, _) in found.items() if plan is not None}
    for what, check in (("service account", account), ("configuration of plans", configuration), ("quota", quota)):
        yield from look(what, lambda check=check: check(remote, plans))
    active = {name: plan for name, (plan, is_active) in found.items() if is_active}
    yield from look("executions in flight", lambda: flight(remote, active))


def plans_of(regions: str) -> list[str]:
    """Return the names of all plans, those of a region with its name behind; `regions` is as launchplans/ reads it."""
    names = regions.replace(",", " ").split()
    return [f"{plan}_{region}" if region else plan for region in names or [""] for plan in PLANS]


def _plan(remote: FlyteRemote, name: str, version: str, active: bool) -> Finding:
    what, project, domain = f"launch plan {name}", remote.default_project, remote.default_domain
    if active:
        return Finding(what=what, state="ok", value=f"version {version} is active")
    if not version:
        return Finding(what=what, state="bad", value="not registered", remedy=REGISTER)
    remedy = f"make activate PLAN={name} PROJECT={project} DOMAIN={domain}, if it shall turn or be triggered"
    return Finding(what=what, state="warning", value=f"version {version} is registered, none active", remedy=remedy)


def run(
    project: str = typer.Option("fednested"), domain: str = typer.Option("development"), at: str = CONNECTOR
) -> None:
    """Print the findings."""
    for finding in look("flyte", lambda: examine(project, domain)):
        typer.echo(json.dumps(finding.to_document()))
    for finding in look("connector service", lambda: connector(at, f"{project}-{domain}")):
        typer.echo(json.dumps(finding.to_document()))


if __name__ == "__main__":
    typer.run(run)

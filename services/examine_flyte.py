"""The Flyte side of `fednested tier1 doctor`: one JSON finding per line.

    python -m services.examine_flyte --project fednested --domain development

Endpoint and credentials are flytekit's own. Only reading calls are made: GetVersion, ListProjects, GetDomains,
ListLaunchPlans, GetActiveLaunchPlan.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import typer

from fednested_lib.finding import Finding, judge, look
from services.flyte import calls, connect_remote, is_configured, registered_version
from services.trigger.launch import ROUTES

# The plans of launchplans/, which services cannot import; a test holds them equal.
PLANS = (*ROUTES.values(), "sensed_round", "data_engine_hourly", "core_update_8_gpu_nightly")
REGISTER = "make register-dev or register-prod"


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
    for plan in plans_of(os.environ.get("FEDNESTED_REGIONS", "")) if project in projects and domain in domains else ():
        yield _plan(remote, plan)


def plans_of(regions: str) -> list[str]:
    """Return the names of all plans, those of a region with its name behind; `regions` is as launchplans/ reads it."""
    names = regions.replace(",", " ").split()
    return [f"{plan}_{region}" if region else plan for region in names or [""] for plan in PLANS]


def _plan(remote, name: str) -> Finding:
    what, project, domain = f"launch plan {name}", remote.default_project, remote.default_domain
    version, active = registered_version(remote, name)
    if active:
        return Finding(what=what, state="ok", value=f"version {version} is active")
    if not version:
        return Finding(what=what, state="bad", value="not registered", remedy=REGISTER)
    remedy = f"make activate PLAN={name} PROJECT={project} DOMAIN={domain}, if it shall turn or be triggered"
    return Finding(what=what, state="warning", value=f"version {version} is registered, none active", remedy=remedy)


def run(project: str = typer.Option("fednested"), domain: str = typer.Option("development")) -> None:
    """Print the findings."""
    for finding in look("flyte", lambda: examine(project, domain)):
        typer.echo(json.dumps(finding.to_document()))


if __name__ == "__main__":
    typer.run(run)

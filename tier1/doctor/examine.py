"""The examination: every check of a federation, in the order in which a first day meets them.

    configuration → keys, people, data, policy → chain, stores, room, lineage → log → registry, clock → pods → Flyte

It changes nothing: no topic is created, no decision recorded; the stores' probe is taken away again. What is wrong with
one part keeps no other from being looked at. Flyte is asked by `services.examine_flyte`, in a process of its own,
because tier 1 never imports flytekit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fednested_lib.errors import FednestedError
from fednested_lib.finding import Finding, look
from tier1.doctor import disk, pods, servers
from tier1.federation import Federation, open_federation

ROOT = Path(__file__).resolve().parents[2]
FLYTE_TIMEOUT_S = 120


def examine(
    path: str | os.PathLike,
    *,
    longest_outage_h: float = 168.0,
    project: str = "",
    domain: str = "",
    connector: str = "",
) -> Iterator[Finding]:
    """Look at everything that a federation needs to turn.

    Args:
        path: tier1.yaml.
        longest_outage_h: hours for which tier 1 may be down without losing an update; bound of the topics' retention.
        project: Flyte project; with the domain, Flyte is looked at too.
        domain: Flyte domain.
        connector: host:port of the connector service; empty: it is not asked.
    """
    try:
        fed = open_federation(path)
    except FednestedError as error:
        yield Finding(what="configuration", state="bad", value=str(error))
        return
    config = fed.config
    yield Finding(what="configuration", state="ok", value=f"{path}: {config.federation}, profile {config.profile}")
    checks = {
        "keys": lambda: disk.keys(config),
        "people": lambda: disk.people(config),
        "data": lambda: disk.data(config),
        "policy": lambda: disk.policy(config),
        "chain": lambda: disk.chain(fed),
        "stores": lambda: disk.stores(fed),
        "disk": lambda: disk.room(fed),
        "lineage outbox": lambda: disk.lineage(fed),
        "log": lambda: servers.log(fed, longest_outage_h=longest_outage_h),
        "registry": lambda: servers.registry(fed),
        "clock": lambda: servers.clock(fed),
    }
    for what, check in checks.items():
        yield from look(what, check)
    if project or domain:
        yield from _cluster(fed, path, f"{project or 'fednested'}-{domain or 'development'}")
        yield from _flyte(project or "fednested", domain or "development", connector)


def _cluster(fed: Federation, path: str | os.PathLike, namespace: str) -> Iterator[Finding]:
    config, environment = fed.config, os.environ
    checks = {
        "seen from": lambda: pods.place(environment, namespace),
        "home in pods": lambda: pods.shared(config, environment, namespace),
        "paths in pods": lambda: pods.paths(path),
        "addresses in pods": lambda: pods.addresses(config),
        "secrets": lambda: pods.secrets(config, environment, namespace),
        "service account of this pod": lambda: pods.account(environment, namespace),
        "candidates in flight": lambda: pods.flight(fed),
    }
    for what, check in checks.items():
        yield from look(what, check)


def _flyte(project: str, domain: str, connector: str) -> Iterator[Finding]:
    command = [sys.executable, "-m", "services.examine_flyte", "--project", project, "--domain", domain]
    command += ["--connector", connector]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=FLYTE_TIMEOUT_S, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        what = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        yield Finding(what="flyte", state="bad", value=what, remedy="run the same with `pyflyte info`")
        return
    for line in done.stdout.splitlines():
        yield Finding(**json.loads(line))

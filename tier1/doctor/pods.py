"""What pods of a cluster need: paths and addresses that mean the same there, secrets, an account; what is in flight.

Seen from inside a pod these are facts. From anywhere else most of them cannot be known, and what cannot be known is a
warning with the command that shows it, never an ok.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from fednested_lib.config import load_yaml
from fednested_lib.finding import Finding, judge
from tier1.config import COMMAND, Tier1Config
from tier1.federation import Federation

TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
OF_ONE_POD = ("overlay", "tmpfs", "ramfs", "rootfs")  # file systems that are gone with their pod
MLFLOW = (("MLFLOW_TRACKING_TOKEN",), ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"))
BLOBS = (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"))


def is_pod(environment: Mapping[str, str]) -> bool:
    """Tell whether this process runs in a pod."""
    return bool(environment.get("KUBERNETES_SERVICE_HOST"))


def place(environment: Mapping[str, str], namespace: str) -> Iterator[Finding]:
    """Say whose view this is: outside a pod, servers and files may be others than those of pods."""
    inside = is_pod(environment)
    yield judge(
        "seen from",
        holds=inside,
        value="a pod" if inside else "this machine: what it reaches and mounts is not what pods do",
        bound="a pod",
        remedy=f"run the doctor in a pod of {namespace}: docs/first-remote-run.md, section 6",
        otherwise="warning",
    )


def shared(config: Tier1Config, environment: Mapping[str, str], namespace: str) -> Iterator[Finding]:
    """Is `home` one place for all pods?"""
    what, value = "home in pods", f"home = {config.home}, home_is_shared = {str(config.home_is_shared).lower()}"
    if not config.home_is_shared:
        remedy = "mount one volume at home in every pod and say home_is_shared: true (docs/first-remote-run.md)"
        yield Finding(what=what, state="bad", value=value, bound="true", remedy=remedy)
    elif not is_pod(environment):
        remedy = f"kubectl describe pvc fednested-home -n {namespace}: ReadWriteMany, and used by every pod"
        yield Finding(what=what, state="warning", value=f"{value}; the volume cannot be seen from here", remedy=remedy)
    else:
        mount, kind = mount_of(config.home, Path("/proc/self/mounts").read_text(encoding="utf-8"))
        yield judge(
            what,
            holds=kind not in OF_ONE_POD,
            value=f"{value}, on {mount} ({kind})",
            bound="a volume",
            remedy=f"mount the claim fednested-home above {config.home}: deploy/flyte/namespace.yaml's pod template",
        )


def mount_of(path: Path, mounts: str) -> tuple[str, str]:
    """Return mount point and kind of the file system that a path lies on, from the text of /proc/self/mounts."""
    rows = [line.split()[1:3] for line in mounts.splitlines()]
    above = [(mount.replace("\\040", " "), kind) for mount, kind in rows]
    return max((row for row in above if path.is_relative_to(row[0])), key=lambda row: len(row[0]), default=("", ""))


def paths(file: str | os.PathLike) -> Iterator[Finding]:
    """Does every path of the file mean the same in a pod, which downloads the file elsewhere?"""
    written = load_yaml(file, Tier1Config, command=COMMAND)
    named = {"identity.key": written.identity.key, "governance.policy": written.governance.policy}
    named |= {f"core.datasets.{name}": path for name, path in written.core.datasets.items()}
    named |= {f"evaluation.suites.{name}": path for name, path in written.evaluation.suites.items()}
    relative = [f"{name} = {path}" for name, path in named.items() if not path.is_absolute()]
    yield judge(
        "paths in pods",
        holds=not relative,
        value=f"relative: {', '.join(relative)}" if relative else f"{len(named)} absolute",
        bound="absolute",
        remedy="write them absolute, on the shared volume or a mounted secret: a pod downloads tier1.yaml elsewhere",
    )


def addresses(config: Tier1Config) -> Iterator[Finding]:
    """Does every address mean the same in a pod?"""
    named = [("log.bootstrap", address.strip()) for address in config.log.servers().split(",")]
    if config.registry.uri.startswith("http"):
        named.append(("registry.uri", config.registry.uri))
    local = [(name, address) for name, address in named if _is_loopback(address)]
    yield judge(
        "addresses in pods",
        holds=not local,
        value=", ".join(f"{name} = {address}" for name, address in local or named),
        bound="no loopback",
        remedy="name the service, for example kafka.kafka.svc:9092: a pod's loopback is the pod itself",
    )


def _is_loopback(address: str) -> bool:
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def secrets(config: Tier1Config, environment: Mapping[str, str], namespace: str) -> Iterator[Finding]:
    """Do the signing key and the credentials of MLflow and the blob store get into a pod? Their values are not read."""
    wanted = {"blob store": BLOBS} | ({"MLflow": MLFLOW} if config.registry.uri.startswith("http") else {})
    if not is_pod(environment):
        for what, secret in {"signing key": "fednested-keys", **dict.fromkeys(wanted, "fednested")}.items():
            remedy = f"kubectl describe secret {secret} -n {namespace}, then run the doctor in a pod"
            value = "whether pods get it cannot be seen from here"
            yield Finding(what=f"secret for {what}", state="warning", value=value, remedy=remedy)
        return
    key = config.identity.key
    yield judge(
        "secret for signing key",
        holds=os.access(key, os.R_OK),
        value=f"{key} {'can' if os.access(key, os.R_OK) else 'cannot'} be read by user {os.getuid()}",
        bound="readable",
        remedy="mount the secret fednested-keys with defaultMode 0400 and, unless pods run as root, an fsGroup",
    )
    for what, ways in wanted.items():
        names = next((way for way in ways if all(environment.get(name) for name in way)), ())
        yield judge(
            f"secret for {what}",
            holds=bool(names),
            value=f"{' and '.join(names)} set" if names else "none in the environment",
            bound=" or ".join("+".join(way) for way in ways),
            remedy=f"put it into the secret fednested of {namespace}, unless {what} asks for no login",
            otherwise="warning",
        )


def account(environment: Mapping[str, str], namespace: str, *, token: Path = TOKEN) -> Iterator[Finding]:
    """As whom does this pod run? Outside a pod there is nothing to say; the plans' account is Flyte's part."""
    if not is_pod(environment):
        return
    wanted = f"system:serviceaccount:{namespace}:{environment.get('FEDNESTED_SERVICE_ACCOUNT', 'fednested')}"
    found = _subject(token)
    yield judge(
        "service account of this pod",
        holds=found == wanted,
        value=found or f"no token at {token}",
        bound=wanted,
        remedy="start the pod with serviceAccountName: fednested in the namespace of project and domain",
        otherwise="warning",
    )


def _subject(token: Path) -> str:
    """Return the subject of a Kubernetes token, unverified: it is our own."""
    try:
        payload = token.read_text(encoding="ascii").split(".")[1]
        return str(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["sub"])
    except (OSError, ValueError, IndexError, KeyError):
        return ""


def flight(fed: Federation) -> Iterator[Finding]:
    """Which candidates and versions wait, and will meet whatever version of the workflows is active then?"""
    from tier1.loops.evaluate_and_promote import newest_candidate, waiting_versions

    candidate, versions = newest_candidate(fed).digest, [str(number) for number, _ in waiting_versions(fed)]
    told = [f"candidate {candidate[:12]} waits for its gate"] if candidate else []
    told += [f"version {', '.join(versions)} waits for a decision"] if versions else []
    yield judge(
        "candidates in flight",
        holds=not told,
        value="; ".join(told) or "none",
        bound="none before an upgrade",
        remedy="settle and decide them first, or upgrade all the same: docs/first-remote-run.md, section 7",
        otherwise="warning",
    )

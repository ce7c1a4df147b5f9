"""What is registered, held against what the project and domain give it. Part of `services.examine_flyte`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fednested_lib.finding import Finding, judge
from services.flyte import calls

if TYPE_CHECKING:
    from flytekit.models.launch_plan import LaunchPlan
    from flytekit.remote import FlyteRemote

PAGE = 100
SUFFIXES = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SUFFIXES |= {f"{letter}i": 2.0 ** (10 * power) for power, letter in enumerate("KMGT", 1)}
BOUNDED = ("cpu", "memory", "gpu", "ephemeral_storage")  # resources of a task that admin limits, under its names


def account(remote: FlyteRemote, plans: Mapping[str, LaunchPlan]) -> Iterator[Finding]:
    """As whom do the pods of the plans run? Whether Kubernetes has the account, admin does not know."""
    namespace = f"{remote.default_project}-{remote.default_domain}"
    names = {_account_of(plan) for plan in plans.values()}
    if "" in names:
        lacking = ", ".join(name for name, plan in plans.items() if not _account_of(plan))
        remedy = "export FEDNESTED_SERVICE_ACCOUNT and register again"
        value = f"{lacking}: the namespace's default"
        yield Finding(what="service account", state="bad", value=value, bound="an account of ours", remedy=remedy)
    for name in sorted(names - {""}):
        remedy = f"kubectl get serviceaccount {name} -n {namespace}; deploy/flyte/namespace.yaml makes it"
        value = "named by the plans; whether it exists cannot be seen from here"
        yield Finding(what=f"service account {name}", state="warning", value=value, remedy=remedy)


def _account_of(plan: LaunchPlan) -> str:
    security = plan.spec.security_context
    named = security.run_as.k8s_service_account if security is not None and security.run_as is not None else ""
    return named or plan.spec.auth_role.kubernetes_service_account or ""


def configuration(remote: FlyteRemote, plans: Mapping[str, LaunchPlan]) -> Iterator[Finding]:
    """Is the tier1.yaml that the plans fix one that pods can read?"""
    uris = {name: plan.spec.fixed_inputs.literals["config"] for name, plan in plans.items() if _fixes_config(plan)}
    for uri in sorted({literal.scalar.blob.uri for literal in uris.values()}):
        what = f"configuration {uri}"
        if "://" in uri and not uri.startswith("file://"):
            remedy = "run one execution: an input that cannot be read fails its first task with the reason"
            value = "named by the plans; whether pods may read it cannot be seen from here"
            yield Finding(what=what, state="warning", value=value, remedy=remedy)
        else:
            remedy = "set FEDNESTED_CONFIG_URI to a bucket, or see that it lies on the volume of every pod"
            yield Finding(what=what, state="warning", value="a local path", bound="on the shared volume", remedy=remedy)


def _fixes_config(plan: LaunchPlan) -> bool:
    return "config" in plan.spec.fixed_inputs.literals


def quota(remote: FlyteRemote, plans: Mapping[str, LaunchPlan]) -> Iterator[Finding]:
    """Does what the largest task of the plans asks for fit into what admin lets a task have?"""
    wanted = _largest(remote, plans)
    limits = _attributes(remote, "TASK_RESOURCE").task_resource_attributes.limits
    place = f"{remote.default_project} {remote.default_domain}"
    for resource, (amount, task) in sorted(wanted.items()):
        limit = getattr(limits, resource)
        what, value = f"quota {resource}", f"{amount} for one pod of {task}"
        if not limit:
            remedy = "kubectl get configmap -n flyte -o yaml | grep -A 12 task_resources; its defaults are small"
            yield Finding(
                what=what, state="warning", value=value, bound="the platform's, unseen from here", remedy=remedy
            )
            continue
        yield judge(
            what,
            holds=quantity(amount) <= quantity(limit),
            value=value,
            bound=f"≤ {limit}",
            remedy=f"flytectl update task-resource-attribute, for {place}, or make the task smaller",
        )
    given = dict(_attributes(remote, "CLUSTER_RESOURCE").cluster_resource_attributes.attributes)
    told = ", ".join(f"{name} {value}" for name, value in sorted(given.items())) or "none told to admin"
    remedy = f"kubectl describe resourcequota -n {place.replace(' ', '-')}: pods beyond it wait, and time-outs run"
    yield Finding(what="quota of the namespace", state="warning", value=told, remedy=remedy)


def _largest(remote: FlyteRemote, plans: Mapping[str, LaunchPlan]) -> dict[str, tuple[str, str]]:
    """Return resource → the largest request of a task of these plans, and the task."""
    largest: dict[str, tuple[str, str]] = {}
    with calls("Flyte did not tell of the plans' workflows"):
        workflows = {str(plan.spec.workflow_id): plan.spec.workflow_id for plan in plans.values()}
        compiled = [remote.client.get_workflow(each).closure.compiled_workflow for each in workflows.values()]
    for template in (task.template for workflow in compiled for task in workflow.tasks):
        for entry in template.container.resources.requests if template.container is not None else ():
            resource = _resource(entry.name)
            if resource in BOUNDED and quantity(entry.value) > quantity(largest.get(resource, ("0", ""))[0]):
                largest[resource] = (entry.value, template.id.name.rsplit(".", 1)[-1])
    return largest


def quantity(text: str) -> float:
    """Return a Kubernetes quantity as a number: 500m is 0.5, 1Gi is 2³⁰."""
    number = text.rstrip("mkKMGTi")
    return float(number) * SUFFIXES[text[len(number) :]]


def _resource(name: int) -> str:
    from flyteidl.core import tasks_pb2

    return tasks_pb2.Resources.ResourceName.Name(name).lower()


def _attributes(remote: FlyteRemote, kind: str):
    """Return the matching attributes of project and domain, empty ones if none are set."""
    from flyteidl.admin import matchable_resource_pb2 as matchable
    from flytekit.exceptions.user import FlyteEntityNotExistException

    place = remote.default_project, remote.default_domain
    with calls(f"Flyte did not tell the attributes of {'/'.join(place)}"):
        try:
            found = remote.client.get_project_domain_attributes(*place, matchable.MatchableResource.Value(kind))
        except FlyteEntityNotExistException:
            return matchable.MatchingAttributes()
    return found.attributes.matching_attributes


def flight(remote: FlyteRemote, active: Mapping[str, LaunchPlan]) -> Iterator[Finding]:
    """Which executions still run, and do they run on versions that are not the active ones?"""
    from flytekit.models.filters import Equal

    running: Counter[tuple[str, str]] = Counter()
    for phase in ("QUEUED", "RUNNING"):
        token = ""
        while True:
            with calls("Flyte did not list its executions"):
                page, token = remote.client.list_executions_paginated(
                    remote.default_project,
                    remote.default_domain,
                    limit=PAGE,
                    token=token,
                    filters=[Equal("phase", phase)],
                )
            running.update((each.spec.launch_plan.name, each.spec.launch_plan.version) for each in page)
            if not token:
                break
    told = ", ".join(f"{count} of {name} {version}" for (name, version), count in sorted(running.items()))
    old = [key for key in running if key[0] in active and key[1] != active[key[0]].id.version]
    yield judge(
        "executions in flight",
        holds=not old,
        value=told or "none",
        bound="of the active versions",
        remedy="each ends on the version that it began with, and holds its plan's one turn until then",
        otherwise="warning",
    )

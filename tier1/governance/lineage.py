"""What was made from what, as DataHub metadata change proposals (MCPs).

    datasets ──► core_update run ──► updates.tier1 ─┐
    devices  ──► updates.experts.local ─────────────┴► aggregate_experts run ──► registry run ──► model version
                                                        ▲                                              │
                                                        └── run of the parent version       promotion ◄┘

Pure functions of plain facts. A run is a DataProcessInstance named by our own run id, which is derived from its inputs,
so that a repeated run is the same node. Model versions and registry runs have the URNs that DataHub's MLflow source
gives them (`lineage_urns.py`). A later proposal replaces the whole aspect, so no event here touches what another said,
aliases apart: a version hangs on our run through the registry run's input, which that source leaves alone. Only
`inputEdges`, `outputEdges`, `trainingJobs` and `groups` are lineage for DataHub; plain `inputs` are not.

No text of a person is in any of these: the reason of a decision stays in the manifest chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fednested_lib.signing import canonical_json, sha256_hex
from tier1.governance import lineage_urns as urns
from tier1.governance.approvals import DecisionInput
from tier1.governance.ports import AccessDecision, LineageEvent, Registered

TRAINING_RUN = "ML Training Run"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset or topic that a run reads or writes.

    Args:
        platform: ``file`` for datasets, ``kafka`` for topics.
        name: name of the dataset or topic.
        digest: digest of the bytes that were read or written.
        detail: what else names them, e.g. offset ranges and log identity of a cut.
    """

    platform: Literal["file", "kafka"]
    name: str
    digest: str
    detail: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pass of the slow or the fast loop.

    Args:
        kind: training of a dense delta, its fold into the head, or the fold of a cut of device updates.
        federation: name of the federation; the Flyte flow in DataHub.
        run_id: id derived from the run's inputs.
        principal: who ran it.
        inputs: datasets or topics it read.
        outputs: topics it wrote (the dense delta of a core update).
        upstream_runs: run ids it builds on: the parent version's run, core updates that it folds.
        access_decisions: ids of the policy decisions it ran under.
        parameters: hyper-parameters.
        metrics: measured values.
        started_ms: milliseconds since the epoch.
        finished_ms: milliseconds since the epoch.
    """

    kind: Literal["core_update", "fold_core", "aggregate_experts"]
    federation: str
    run_id: str
    principal: str
    inputs: Sequence[Source]
    outputs: Sequence[Source] = ()
    upstream_runs: Sequence[str] = ()
    access_decisions: Sequence[str] = ()
    parameters: Mapping[str, str | int | float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    started_ms: int
    finished_ms: int


@dataclass(frozen=True, kw_only=True)
class MadeVersion:
    """A version of the chain that the registry has taken in.

    Args:
        model_name: name of the registered model.
        registered: the registry's entry.
        version: number in the chain.
        manifest_digest: digest of its chain entry.
        run_id: our run that made it.
        principal: who ran that.
        losses: mean loss per suite.
        made_ms: milliseconds since the epoch.
    """

    model_name: str
    registered: Registered
    version: int
    manifest_digest: str
    run_id: str
    principal: str
    losses: Mapping[str, float] = field(default_factory=dict)
    made_ms: int


def run_event(run: Run) -> LineageEvent:
    """Describe a run: its flow and job, its inputs, its result."""
    import datahub.metadata.schema_classes as m

    flow, job = urns.flow(run.federation), urns.job(run.federation, run.kind)
    instance = urns.run(run.run_id)
    sources = {urns.dataset(source.platform, source.name): source for source in (*run.inputs, *run.outputs)}
    upstream = [urns.run(run_id) for run_id in run.upstream_runs]
    edges_in = [
        _edge(urns.dataset(source.platform, source.name), {"digest": source.digest, **source.detail})
        for source in run.inputs
    ]
    decisions = {f"access_decision_{position}": decision for position, decision in enumerate(run.access_decisions)}
    aspects: list[tuple[str, Any]] = [(urn, m.StatusClass(removed=False)) for urn in sources]
    aspects += [
        (flow, m.DataFlowInfoClass(name=run.federation)),
        (job, m.DataJobInfoClass(name=run.kind, type="COMMAND", flowUrn=flow)),
        *_instance(instance, f"{run.kind} {run.run_id}", run.principal, run.started_ms, TRAINING_RUN, decisions),
        (instance, m.DataProcessInstanceRelationshipsClass(parentTemplate=job, upstreamInstances=upstream)),
        (instance, m.DataProcessInstanceInputClass(inputs=[], inputEdges=edges_in + [_edge(urn) for urn in upstream])),
        (instance, _measured(run.run_id, run.metrics, run.parameters)),
        *_finished(instance, run.started_ms, run.finished_ms),
    ]
    if run.outputs:
        edges_out = [
            _edge(urns.dataset(source.platform, source.name), {"digest": source.digest, **source.detail})
            for source in run.outputs
        ]
        aspects.append((instance, m.DataProcessInstanceOutputClass(outputs=[], outputEdges=edges_out)))
    return LineageEvent(kind=run.kind, run_id=run.run_id, manifest_digest=None, proposals=_proposals(aspects))


def version_event(made: MadeVersion) -> LineageEvent:
    """Link a run to the model version that it made, as the registry names it."""
    import datahub.metadata.schema_classes as m

    registered = made.registered
    platform = registered.platform
    model, group = _model(made.model_name, registered), urns.model_group(platform, made.model_name)
    run, registry_run = urns.run(made.run_id), urns.run(registered.run_id, orchestrator=platform)
    properties = m.MLModelPropertiesClass(
        name=f"{made.model_name} {made.version}",
        customProperties=dict(registered.tags),
        created=m.TimeStampClass(time=made.made_ms, actor=urns.person(made.principal)),
        trainingMetrics=_metrics(made.losses),
        trainingJobs=[registry_run, run],
        groups=[group],
    )
    aspects = [
        (group, m.MLModelGroupPropertiesClass(name=made.model_name)),
        (model, properties),
        (model, _version_properties(made.model_name, registered, aliases=())),
        *_instance(
            registry_run, f"version {made.version}", made.principal, made.made_ms, TRAINING_RUN, dict(registered.tags)
        ),
        (registry_run, m.DataProcessInstanceInputClass(inputs=[], inputEdges=[_edge(run)])),
        (registry_run, m.DataProcessInstanceOutputClass(outputs=[], outputEdges=[_edge(model)])),
        (registry_run, _measured(registered.run_id, made.losses, {})),
        (registry_run, m.DataPlatformInstanceClass(platform=urns.platform(platform))),
        *_finished(registry_run, made.made_ms, made.made_ms),
    ]
    return LineageEvent(
        kind="version", run_id=made.run_id, manifest_digest=made.manifest_digest, proposals=_proposals(aspects)
    )


def promotion_event(
    *,
    model_name: str,
    version: int,
    run_id: str,
    decision: DecisionInput,
    access: AccessDecision,
    registered: Registered | None,
    previous: Registered | None,
    decided_ms: int,
) -> LineageEvent:
    """Describe a decision about a version and, if it approves, the move of the champion alias.

    Args:
        model_name: name of the registered model.
        version: number in the chain.
        run_id: our run that made the version.
        decision: the approver's decision, bound to the version's manifest.
        access: the policy's answer to it.
        registered: the version in the registry; None while the registry cannot be reached.
        previous: the champion so far in the registry; None if there is none.
        decided_ms: milliseconds since the epoch.
    """
    import datahub.metadata.schema_classes as m

    facts = {
        "verdict": decision.verdict,
        "version": str(version),
        "manifest_digest": decision.manifest_digest,
        "identity": decision.identity,
        "channel": decision.channel,
        "access_decision": access.id,
    }
    decision_id = sha256_hex(canonical_json([facts, decision.approver, decision.token_sha256]))
    instance = urns.run(decision_id)
    inputs = [_edge(urns.run(run_id))] + ([_edge(_model(model_name, registered))] if registered else [])
    aspects = [
        *_instance(
            instance, f"{decision.verdict} version {version}", decision.approver, decided_ms, "Promotion", facts
        ),
        (instance, m.DataProcessInstanceInputClass(inputs=[], inputEdges=inputs)),
        *_finished(instance, decided_ms, decided_ms),
    ]
    if decision.verdict == "approve" and registered:
        if previous and previous.number != registered.number:
            aspects.append((_model(model_name, previous), _version_properties(model_name, previous, aliases=())))
        aspects.append(
            (_model(model_name, registered), _version_properties(model_name, registered, aliases=("champion",)))
        )
    return LineageEvent(
        kind="promotion", run_id=decision_id, manifest_digest=decision.manifest_digest, proposals=_proposals(aspects)
    )


def _model(model_name: str, registered: Registered) -> str:
    return urns.model(registered.platform, model_name, registered.number)


def _version_properties(model_name: str, registered: Registered, *, aliases: Sequence[str]) -> Any:
    import datahub.metadata.schema_classes as m

    return m.VersionPropertiesClass(
        version=m.VersionTagClass(versionTag=registered.number),
        versionSet=urns.version_set(registered.platform, model_name),
        sortId=registered.number.zfill(10),
        aliases=[m.VersionTagClass(versionTag=alias) for alias in aliases],
    )


def _instance(
    urn: str, name: str, principal: str, at_ms: int, subtype: str, properties: Mapping[str, str]
) -> list[tuple[str, Any]]:
    import datahub.metadata.schema_classes as m

    created = m.AuditStampClass(time=at_ms, actor=urns.person(principal))
    return [
        (urn, m.DataProcessInstancePropertiesClass(name=name, created=created, customProperties=dict(properties))),
        (urn, m.SubTypesClass(typeNames=[subtype])),
    ]


def _finished(urn: str, started_ms: int, finished_ms: int) -> list[tuple[str, Any]]:
    import datahub.metadata.schema_classes as m

    result = m.DataProcessInstanceRunResultClass(type="SUCCESS", nativeResultType=urns.ORCHESTRATOR)
    return [
        (urn, m.DataProcessInstanceRunEventClass(status="STARTED", timestampMillis=started_ms)),
        (
            urn,
            m.DataProcessInstanceRunEventClass(
                status="COMPLETE", timestampMillis=finished_ms, result=result, durationMillis=finished_ms - started_ms
            ),
        ),
    ]


def _measured(run_id: str, metrics: Mapping[str, float], parameters: Mapping[str, Any]) -> Any:
    import datahub.metadata.schema_classes as m

    return m.MLTrainingRunPropertiesClass(
        id=run_id,
        trainingMetrics=_metrics(metrics),
        hyperParams=[m.MLHyperParamClass(name=name, value=str(value)) for name, value in sorted(parameters.items())],
    )


def _metrics(metrics: Mapping[str, float]) -> list[Any]:
    import datahub.metadata.schema_classes as m

    return [m.MLMetricClass(name=name, value=str(value)) for name, value in sorted(metrics.items())]


def _edge(destination: str, properties: Mapping[str, str] | None = None) -> Any:
    import datahub.metadata.schema_classes as m

    return m.EdgeClass(destinationUrn=destination, properties=dict(properties) if properties else None)


def _proposals(aspects: Iterable[tuple[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    from datahub.emitter.mcp import MetadataChangeProposalWrapper

    return tuple(
        MetadataChangeProposalWrapper(entityUrn=urn, aspect=aspect).to_obj(simplified_structure=True)
        for urn, aspect in aspects
    )

"""Names in the catalogue: DataHub URNs of what a federation reads, runs and makes.

Model versions, the registry's runs and the version set have the URNs that DataHub's own MLflow source makes
(`datahub.ingestion.source.mlflow`, acryl-datahub 1.7), so a site that also ingests from MLflow sees each of them once.
"""

from __future__ import annotations

ENVIRONMENT = "PROD"
ORCHESTRATOR = "fednested"


def run(run_id: str, *, orchestrator: str = ORCHESTRATOR) -> str:
    """Return the URN of a run; orchestrator ``mlflow`` gives the one that DataHub's MLflow source makes."""
    from datahub.emitter.mce_builder import datahub_guid
    from datahub.metadata.urns import DataProcessInstanceUrn

    return str(DataProcessInstanceUrn(datahub_guid({"orchestrator": orchestrator, "id": run_id})))


def flow(federation: str) -> str:
    """Return the URN of a federation's Flyte flow."""
    from datahub.metadata.urns import DataFlowUrn

    return str(DataFlowUrn("flyte", federation, ENVIRONMENT))


def job(federation: str, loop: str) -> str:
    """Return the URN of one loop in that flow."""
    from datahub.metadata.urns import DataJobUrn

    return str(DataJobUrn(flow(federation), loop))


def dataset(platform_name: str, name: str) -> str:
    """Return the URN of a dataset or topic."""
    from datahub.metadata.urns import DatasetUrn

    return str(DatasetUrn(platform_name, name, ENVIRONMENT))


def model(platform_name: str, model_name: str, number: str) -> str:
    """Return the URN of a registered version."""
    from datahub.metadata.urns import MlModelUrn

    return str(MlModelUrn(platform_name, f"{model_name}_{number}", ENVIRONMENT))


def model_group(platform_name: str, model_name: str) -> str:
    """Return the URN of the registered model."""
    from datahub.metadata.urns import MlModelGroupUrn

    return str(MlModelGroupUrn(platform_name, model_name, ENVIRONMENT))


def version_set(platform_name: str, model_name: str) -> str:
    """Return the URN of the set that all versions of a model share.

    The SDK's `MLModel(version=…)` would make a set for every version instead.
    """
    from datahub.emitter.mce_builder import datahub_guid
    from datahub.metadata.urns import VersionSetUrn

    return str(VersionSetUrn(datahub_guid({"platform": platform_name, "name": model_name}), "mlModel"))


def person(principal: str) -> str:
    """Return the URN of a person or service account."""
    from datahub.metadata.urns import CorpUserUrn

    return str(CorpUserUrn(principal))


def platform(platform_name: str) -> str:
    """Return the URN of a platform."""
    from datahub.metadata.urns import DataPlatformUrn

    return str(DataPlatformUrn(platform_name))

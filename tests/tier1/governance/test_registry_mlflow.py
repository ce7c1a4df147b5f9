"""What only a real MLflow server can do: be away, hang, hold foreign entries, and be read by DataHub."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from fednested_lib.errors import GovernanceError, TransportError
from images import specs
from tests.flyte.absent import lacking, run_without
from tier1.governance import lineage_urns as urns
from tier1.governance.lineage import MadeVersion, version_event
from tier1.governance.ports import RegistryState
from tier1.governance.registry_mlflow import MlflowRegistry


@pytest.fixture
def registry(mlflow_server: str) -> MlflowRegistry:
    """An empty registered model on the server."""
    return MlflowRegistry(mlflow_server, f"moe-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def client(mlflow_server: str):
    """MLflow's own client, as anybody with access to the server would use it."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=mlflow_server, registry_uri=mlflow_server)


def _state(registry_versions: dict, **aliases) -> RegistryState:
    return RegistryState(
        candidate=aliases.get("candidate"),
        champion=aliases.get("champion"),
        manifests={number: version.manifest_digest for number, version in registry_versions.items()},
        entries=["h0"],
        load=registry_versions.__getitem__,
    )


def test_people_find_losses_tags_and_aliases_where_they_look(registry, client, made):
    """The run carries the loss of every suite, the model version the tags, the model the aliases; no stage is used."""
    registry.repair(_state({0: made(0)}, candidate=0, champion=0))
    entry = client.get_model_version_by_alias(registry.model_name, "champion")
    assert entry.tags["manifest_digest"] == made(0).manifest_digest
    assert entry.current_stage == "None"
    assert client.get_logged_model(entry.source.removeprefix("models:/")).status == "READY"
    run = client.get_run(entry.run_id)
    assert run.data.metrics == {"loss.hamlet": 2.5, "loss.the tempest": 2.0}
    assert run.info.status == "FINISHED"


def test_the_client_package_alone_is_enough(registry, made, mlflow_server):
    """The control image has mlflow-skinny: registering, aliases and artifacts work without pandas and the like."""
    program = f"""
from tier1.governance.ports import ModelVersion, RegistryState
from tier1.governance.registry_mlflow import MlflowRegistry
made = {made(0)!r}
state = RegistryState(candidate=0, champion=0, manifests={{0: made.manifest_digest}}, entries=["h0"],
                      load={{0: made}}.__getitem__)
MlflowRegistry({mlflow_server!r}, {registry.model_name!r}).repair(state)
"""
    run_without(lacking(specs.control), program)
    assert set(registry.aliases()) == {"candidate", "champion"}


def test_a_deleted_model_is_made_again(registry, client, made):
    """Even a registered model that somebody deleted is rebuilt from the chain."""
    state = _state({0: made(0), 1: made(1)}, candidate=1, champion=0)
    registry.repair(state)
    client.delete_registered_model(registry.model_name)
    assert registry.versions() == ()
    registry.repair(state)
    assert {alias: registry.get(alias).tags["version"] for alias in registry.aliases()} == {
        "candidate": "1",
        "champion": "0",
    }


def test_a_deleted_version_and_deleted_artifacts_are_made_again(registry, client, made):
    """A model version or a logged model that somebody deleted comes back, and the alias with it."""
    state = _state({0: made(0)}, candidate=0, champion=0)
    registry.repair(state)
    client.delete_model_version(registry.model_name, registry.get("champion").number)
    registry.repair(state)
    client.delete_logged_model(registry.get("champion").source.removeprefix("models:/"))
    registry.repair(state)
    assert registry.manifest(registry.get("champion")) == made(0).manifest


def test_a_foreign_source_is_not_ours(registry, client, made):
    """MLflow takes a model version from anywhere; with our tags on it, it is still not the version."""
    version = made(0)
    registry.repair(_state({0: version}, champion=0))
    evil = client.create_model_version(registry.model_name, "s3://evil/x", tags=version.tags(), await_creation_for=0)
    client.set_registered_model_alias(registry.model_name, "champion", evil.version)
    assert registry.get("champion") is None
    assert registry.repair(_state({0: version}, champion=0)) == (f"alias champion: {evil.version} → 1",)
    assert registry.manifest(registry.get("champion")) == version.manifest


def test_a_dead_server_is_an_error_within_seconds(made):
    """Nobody listens: one line with the address and the remedy, soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(
        TransportError, match=rf"MLflow at {uri} cannot be reached .*: start the server, or set registry\.uri"
    ):
        MlflowRegistry(uri, "moe").register(made(0))
    assert time.monotonic() - start < 60  # MLflow's own retries take minutes


def test_a_hanging_server_is_an_error_within_the_timeout(monkeypatch: pytest.MonkeyPatch):
    """Somebody listens and never answers: the time limit holds, twice for the one retry."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        start = time.monotonic()
        with pytest.raises(TransportError, match="cannot be reached"):
            MlflowRegistry(f"http://127.0.0.1:{silent.getsockname()[1]}", "moe").versions()
        assert time.monotonic() - start < 60  # MLflow's own retries take minutes


def test_a_refusal_is_not_an_outage(registry, made):
    """What the server refuses, trying again does not mend, so it is another error."""
    registry.repair(_state({0: made(0)}, champion=0))
    with pytest.raises(GovernanceError, match="refused"):
        registry.point("latest", "1")


def test_telemetry_is_off_and_nothing_connects_elsewhere(mlflow_server: str, tmp_path: Path):
    """A fresh process that registers a version connects to the registry and to nothing else, and prints nothing."""
    script = f"""
import sys
seen = set()
def watch(event, arguments):
    if event == "socket.connect": seen.add(str(arguments[1][:2]))
    if event == "socket.getaddrinfo": seen.add(str(arguments[0]))
sys.addaudithook(watch)
from tier1.governance.ports import ModelVersion
from tier1.governance.registry_mlflow import MlflowRegistry
registry = MlflowRegistry({mlflow_server!r}, "quiet")
registry.register(ModelVersion(version=0, manifest=b"m", snapshot=b"s", weights_digest="w", chain_head="h"))
print(sorted(name for name in seen if "127.0.0.1" not in name))
"""
    hidden = ("PYTEST_CURRENT_TEST", "CI", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")  # each would silence it for us
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {
        "PYTHONPATH": str(Path.cwd())
    }
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_datahubs_own_mlflow_source_gives_the_same_names(registry, made):
    """A site that also ingests from MLflow sees our run, version, group and version set once, not twice."""
    pytest.importorskip("datahub.ingestion.source.mlflow")
    from datahub.ingestion.api.common import PipelineContext
    from datahub.ingestion.source.mlflow import MLflowSource

    entry = registry.register(made(2))
    source = MLflowSource.create(
        {"tracking_uri": registry.uri, "registry_uri": registry.uri},
        PipelineContext(run_id="test", pipeline_name="test"),
    )
    theirs = [unit.metadata for unit in source.get_workunits_internal()]
    facts = MadeVersion(
        model_name=registry.model_name,
        registered=entry,
        version=2,
        manifest_digest=made(2).manifest_digest,
        run_id="fold-2",
        principal="svc-trainer",
        made_ms=1,
    )
    ours = version_event(facts).proposals
    wanted = {
        urns.model("mlflow", registry.model_name, entry.number),
        urns.run(entry.run_id, orchestrator="mlflow"),
        urns.model_group("mlflow", registry.model_name),
    }
    assert wanted <= {proposal.entityUrn for proposal in theirs}
    assert wanted <= {proposal["entityUrn"] for proposal in ours}
    version_set = urns.version_set("mlflow", registry.model_name)
    assert version_set in {
        proposal.aspect.versionSet for proposal in theirs if proposal.aspectName == "versionProperties"
    }
    assert version_set in {p["aspect"]["json"]["versionSet"] for p in ours if p["aspectName"] == "versionProperties"}

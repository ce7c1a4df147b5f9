"""`fednested tier1 doctor` on real parts: what it finds, what it says to do, and that it changes nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import yaml
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from flyteidl.admin import agent_pb2
from flyteidl.admin import matchable_resource_pb2 as matchable
from flyteidl.service import agent_pb2_grpc
from flytekit.extend.backend.base_connector import ConnectorRegistry
from typer.testing import CliRunner

from fednested_lib.finding import Finding
from fednested_lib.log import TOPICS, UPDATES, KafkaLog
from images import specs
from services.embedded import EmbeddedBroker
from services.examine_connector import SERVED, connector
from services.examine_registered import quantity
from tests.federation import Device, make_workspace
from tests.flyte.absent import lacking, run_without
from tests.flyte.admin_stand_in import AdminStandIn
from tier1.commands import app
from tier1.config import Tier1Config
from tier1.doctor import disk, pods
from tier1.doctor.examine import _cluster, examine
from tier1.federation import open_federation
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.evaluate_and_promote import settle_candidate
from tier1.loops.genesis import ensure_genesis


def bad(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings if finding.state == "bad"}


def look(config: Path, **options: object) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(config, **options)}


def change(config: Path, **sections: object) -> None:
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **sections}))


def tree(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A workspace before its first loop."""
    return make_workspace(tmp_path)


def test_a_healthy_federation_has_nothing_bad_and_is_not_touched(config: Path) -> None:
    """Chain, weights and stores are read, the probe is gone again, and no byte under the workspace differs."""
    fed = open_federation(config)
    ensure_genesis(fed)
    Device(fed, "ann").send(base=0)
    settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    before = tree(config.parent)
    found = look(config)
    assert not bad(list(found.values()))
    assert "head 1" in found["chain"].value
    assert found["store blobs"].bound == "create-if-absent"
    assert tree(config.parent) == before


def test_the_command_prints_findings_and_says_it_by_its_exit_code(config: Path) -> None:
    """Exit code 0 while nothing is bad, 1 with the finding and its remedy when something is."""
    assert CliRunner().invoke(app, ["doctor", "--config", str(config)]).exit_code == 0
    (config.parent / "policy.yaml").unlink()
    told = CliRunner().invoke(app, ["doctor", "--config", str(config)])
    assert told.exit_code == 1
    assert "policy.yaml does not exist: write one" in told.output
    assert "1 bad" in told.output


def test_a_wrong_configuration_is_the_only_finding(config: Path) -> None:
    """Nothing else can be looked at, and the line is the configuration's own."""
    change(config, homee="x")
    (finding,) = examine(config)
    assert (finding.state, "unknown key homee" in finding.value) == ("bad", True)


def test_each_missing_part_is_named_and_hides_no_other(config: Path) -> None:
    """A key that others can read or nobody trusts, lost data, no approver, no right to train: all in one look."""
    document = yaml.safe_load(config.read_text())
    (config.parent / "keys/tier1.key").chmod(0o644)
    (config.parent / "data/heldout.jsonl").unlink()
    identity = {**document["identity"], "principal": "stranger", "trusted": {"ab" * 32: "tier1"}}
    governance = {**document["governance"], "approvers": {}, "allow_unverified": False}
    change(config, identity=identity, governance=governance, devices={})
    found = look(config)
    assert {"trusted signatures", "suite plays", "approvers", "may train", "may publish"} <= set(bad([*found.values()]))
    assert "chmod 600" in found["signing key"].remedy
    assert found["devices"].state == "warning"


def test_a_damaged_chain_and_a_lost_blob_are_named(config: Path) -> None:
    """The entry that was altered, and how many of head's blobs are missing, with what restores them."""
    fed = open_federation(config)
    ensure_genesis(fed)
    Path(fed.blobs.location(next(iter(fed.chain.state().head.blobs.values())))).unlink()
    assert "replay --version 0" in bad([*look(config).values()])["weights of head"].remedy
    entry = next((fed.home / "chain").glob("*.json"))
    entry.write_bytes(entry.read_bytes().replace(b"fednested", b"fednestad"))
    assert entry.name in bad([*look(config).values()])["chain"].value


def test_a_home_that_cannot_be_made_is_found_before_a_loop_does(config: Path) -> None:
    """The first loop would stop at it after an hour of training."""
    change(config, home="data/train.jsonl/home")
    assert "train.jsonl" in bad([*look(config).values()])["home"].bound


def test_a_full_disk_is_found(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less room than the bound is bad, with both numbers."""
    monkeypatch.setattr("tier1.doctor.disk.GIB", 1 << 60)
    assert bad([*look(config).values()])["disk"].bound == "≥ 1.0 GiB"


def test_the_log_dead_empty_and_forgetful(tmp_path: Path) -> None:
    """A broker that is away, topics that are missing, and retention shorter than the longest outage."""
    with EmbeddedBroker(tmp_path / "broker") as broker:
        config = make_workspace(tmp_path / "w", bootstrap=broker.bootstrap)
        found = look(config)
        assert {what for what in bad([*found.values()]) if what.startswith("topic")} == {f"topic {t}" for t in TOPICS}
        assert "bootstrap-topics" in found[f"topic {UPDATES}"].remedy
        log = KafkaLog(broker.bootstrap)
        assert not set(log._existing()) & set(TOPICS), "the doctor creates no topic"
        log.create_topics(TOPICS)
        assert not bad([*look(config).values()])
        set_retention(broker.bootstrap, UPDATES, hours=1)
        forgetful = bad([*look(config, longest_outage_h=24).values()])
        assert forgetful[f"topic {UPDATES}"].value == "kept 1 h"
        assert "retention.ms=86400000" in forgetful[f"topic {UPDATES}"].remedy
        log.close()
    assert "start the broker" in bad([*look(config).values()])["log"].value


def set_retention(bootstrap: str, topic: str, *, hours: int) -> None:
    entry = ConfigEntry("retention.ms", str(hours * 3_600_000), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource("topic", topic, incremental_configs=[entry])
    client = AdminClient({"bootstrap.servers": bootstrap})
    for done in client.incremental_alter_configs([resource]).values():
        done.result(10)


def test_a_registry_that_is_away_is_found(config: Path) -> None:
    """With its address and what to do; the clock, which only it tells, is not guessed."""
    change(config, registry={"uri": "http://127.0.0.1:9"})
    found = look(config)
    assert "cannot be reached" in bad([*found.values()])["registry"].value
    assert "clock" not in found


def test_flyte_is_asked_for_project_and_plans(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an endpoint the remedy says how to name one; with one, each plan is active, waiting or not registered."""
    monkeypatch.setenv("HOME", str(config.parent))
    monkeypatch.delenv("FLYTE_PLATFORM_URL", raising=False)
    found = look(config, project="fednested")
    assert {"flyte endpoint", "home in pods"} <= set(bad([*found.values()]))
    with AdminStandIn(plans=("nested_round_fast",)) as admin:
        for name, value in admin.environment.items():
            monkeypatch.setenv(name, value)
        found = look(config, project="fednested", domain="development")
        assert found["launch plan nested_round_fast"].state == "ok"
        assert not admin.admitted
        assert bad([*found.values()])["launch plan sensed_round"].value == "not registered"
        assert "flyte project" in bad([*look(config, project="other").values()])


def test_flyte_is_asked_for_accounts_quotas_and_what_is_in_flight(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What admin knows is judged with its number; what Kubernetes alone knows is a warning with a command."""
    with AdminStandIn(plans=("nested_round_fast",)) as admin:
        for name, value in admin.environment.items():
            monkeypatch.setenv(name, value)
        found = look(config, project="fednested")
        unseen = ("service account fednested", "configuration s3://acme/tier1.yaml", "quota gpu", "connector service")
        assert [found[what].state for what in (*unseen, "quota of the namespace")] == ["warning"] * 5
        assert "kubectl get serviceaccount fednested -n fednested-development" in found[unseen[0]].remedy
        assert found["executions in flight"].state == "ok"

        limits = matchable.TaskResourceSpec(cpu="4000m", memory="4Gi", gpu="8")
        admin.attributes[matchable.TASK_RESOURCE] = matchable.MatchingAttributes(
            task_resource_attributes=matchable.TaskResourceAttributes(limits=limits)
        )
        given = matchable.ClusterResourceAttributes(attributes={"projectQuotaCpu": "64"})
        admin.attributes[matchable.CLUSTER_RESOURCE] = matchable.MatchingAttributes(cluster_resource_attributes=given)
        admin.account = ""
        admin.run("old-round")
        found = look(config, project="fednested")
        assert {what for what in bad([*found.values()]) if what.startswith("quota")} == {"quota memory"}
        assert "8Gi for one pod of large (bound: ≤ 4Gi)" in str(found["quota memory"])
        assert "projectQuotaCpu 64" in found["quota of the namespace"].value
        assert "FEDNESTED_SERVICE_ACCOUNT" in bad([*found.values()])["service account"].remedy


@pytest.mark.parametrize(("text", "number"), [("500m", 0.5), ("8", 8), ("1Gi", 2**30), ("2k", 2000), ("64Mi", 2**26)])
def test_quantities_are_those_of_kubernetes(text: str, number: float) -> None:
    """A limit of 500m is half a core and no five hundred."""
    assert quantity(text) == number


def test_executions_of_an_older_version_are_told(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an upgrade a round still waits at its gate: it is named with its plan and version."""
    with AdminStandIn(plans=("nested_round_fast",)) as admin:
        for name, value in admin.environment.items():
            monkeypatch.setenv(name, value)
        admin.run("old-round")
        plan = admin.executions["old-round"].spec.launch_plan
        plan.name, plan.version = "nested_round_fast", "v0"
        found = look(config, project="fednested")["executions in flight"]
        assert (found.state, found.value) == ("warning", "1 of nested_round_fast v0")


def test_a_connector_is_asked_what_it_serves() -> None:
    """Both sensors' types are there, or one is missing, or nobody listens; nothing is guessed without an address."""
    assert {*SERVED} == served_types()
    with served({*SERVED}) as address:
        assert [each.state for each in connector(address, "n")] == ["ok"]
    with served({"sensor"}) as address:
        (found,) = connector(address, "n")
        assert (found.state, found.bound) == ("bad", ", ".join(SERVED))
    (found,) = connector(address, "n")
    assert "does not answer" in found.value
    (found,) = connector("", "fednested-production")
    assert (found.state, "--connector fednested-connector.fednested-production:8000" in found.remedy) == (
        "warning",
        True,
    )


@contextmanager
def served(kinds: set[str]) -> Iterator[str]:
    class Metadata(agent_pb2_grpc.AgentMetadataServiceServicer):
        def ListAgents(self, request, context):
            categories = [agent_pb2.TaskCategory(name=kind) for kind in sorted(kinds)]
            return agent_pb2.ListAgentsResponse(agents=[agent_pb2.Agent(supported_task_categories=categories)])

    server = grpc.server(futures.ThreadPoolExecutor(1))
    agent_pb2_grpc.add_AgentMetadataServiceServicer_to_server(Metadata(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def served_types() -> set[str]:
    import tasks.sensors.kafka_backlog
    import tasks.sensors.kafka_window  # noqa: F401  registers its connector

    return {each.name for each in ConnectorRegistry._REGISTRY}


def test_outside_a_pod_nothing_of_a_pod_is_ok(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and addresses that cannot work are bad anywhere; volume and secrets are warnings with a command."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    change(config, log={"bootstrap": "localhost:9092"}, home=str(config.parent / "home"), home_is_shared=True)
    monkeypatch.setattr("tier1.doctor.servers.TIMEOUT_S", 0.2)
    opened = open_federation(config)
    found = {each.what: each for each in _cluster(opened, config, "fednested-production")}
    assert {"paths in pods", "addresses in pods"} == set(bad([*found.values()]))
    assert "identity.key = keys/tier1.key" in found["paths in pods"].value
    unseen = ("seen from", "home in pods", "secret for signing key", "secret for blob store")
    assert all(found[what].state == "warning" for what in unseen)
    assert "kubectl describe pvc fednested-home -n fednested-production" in found["home in pods"].remedy


def test_inside_a_pod_secrets_account_and_volume_are_seen(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key without permission, credentials by either way, the token's subject, a home that is gone with its pod."""
    opened = open_federation(config).config.model_copy(
        update={"registry": {"uri": "http://mlflow:5000"}, "home_is_shared": True}
    )
    opened = Tier1Config.model_validate(opened.model_dump())
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    found = {each.what: each for each in pods.secrets(opened, pod, "ns")}
    assert [found[f"secret for {what}"].state for what in ("signing key", "blob store", "MLflow")] == [
        *("ok", "ok", "warning")
    ]
    assert "MLFLOW_TRACKING_TOKEN" in found["secret for MLflow"].bound
    assert "b" not in found["secret for blob store"].value.split()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    for mode, state in ((0o440, "ok"), (0o444, "warning"), (0o460, "warning")):  # the first is what fsGroup makes
        opened.identity.key.chmod(mode)
        assert next(iter(disk.keys(opened))).state == state
    opened.identity.key.unlink()
    assert next(iter(pods.secrets(opened, pod, "ns"))).state == "bad"

    body = base64.urlsafe_b64encode(b'{"sub":"system:serviceaccount:ns:fednested"}').decode().rstrip("=")
    (tmp_path / "token").write_text(f"e30.{body}.x")
    assert [each.state for each in pods.account(pod, "ns", token=tmp_path / "token")] == ["ok"]
    assert [each.state for each in pods.account(pod, "other", token=tmp_path / "token")] == ["warning"]
    assert [each.state for each in pods.account(pod, "ns", token=tmp_path / "none")] == ["warning"]

    mounts = "overlay / overlay rw 0 0\nnfs:/x /fednested nfs4 rw 0 0\ntmpfs /fed tmpfs rw 0 0\n"
    assert pods.mount_of(Path("/fednested/home"), mounts) == ("/fednested", "nfs4")
    assert pods.mount_of(Path("/fednested2"), mounts) == ("/", "overlay")


def test_the_doctor_runs_in_the_connectors_image(config: Path) -> None:
    """The pod that docs/first-remote-run.md starts has what the connector has: no torch, no transformers."""
    fed = open_federation(config)
    ensure_genesis(fed)
    program = f"""
from tier1.doctor.examine import examine
found = {{each.what: each for each in examine({str(config)!r}, project="fednested")}}
assert found["chain"].state == found["candidates in flight"].state == "ok", found
assert found["flyte endpoint"].state == "bad", found
"""
    run_without(lacking(specs.connector), program)


def test_candidates_in_flight_are_told_before_an_upgrade(config: Path) -> None:
    """Nothing, a candidate before its gate, then a version before its decision."""
    fed = open_federation(config)
    ensure_genesis(fed)
    assert [each.state for each in pods.flight(fed)] == ["ok"]
    Device(fed, "ann").send(base=0)
    candidate = fold_updates(fed, take_updates(fed))
    assert candidate.digest[:12] in next(iter(pods.flight(fed))).value
    settle_candidate(fed, candidate)
    assert next(iter(pods.flight(fed))).value == "version 1 waits for a decision"


def test_the_plans_that_are_asked_for_are_those_that_exist() -> None:
    """Services cannot import launch plans: the two lists are held equal here."""
    from launchplans import gpu, schedules
    from services.examine_flyte import PLANS, plans_of

    assert sorted(PLANS) == sorted(plan.name for plan in (*schedules.PLANS, *gpu.PLANS))
    assert plans_of("") == list(PLANS)
    of_regions = [plan.name for region in ("eu", "us") for plan in schedules._plans(region)]
    assert set(of_regions) < set(plans_of("eu, us"))
    assert len(plans_of("eu, us")) == 2 * len(PLANS)

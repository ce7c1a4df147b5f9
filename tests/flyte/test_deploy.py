"""What an operator copies: values for Flyte that fit what is packaged, manifests, a page whose commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from flyteidl.admin import task_pb2
from flytekit.extend.backend.base_connector import ConnectorRegistry

from benchmarks.results import ROOT
from fednested_lib.config import load_yaml
from tests.flyte.packaged import SNAPSHOT, of_this_checkout
from tier1.config import Tier1Config

FLYTE = ROOT / "deploy/flyte"
PAGE = ROOT / "docs/first-remote-run.md"


@pytest.fixture(scope="module")
def inline() -> dict[str, Any]:
    return yaml.safe_load((FLYTE / "values.yaml").read_text())["configuration"]["inline"]


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    documents = yaml.safe_load_all((FLYTE / "namespace.yaml").read_text())
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


@pytest.mark.slow
def test_every_packaged_task_type_is_enabled(inline: dict[str, Any]) -> None:
    """A task type without a plugin fails at its first execution, long after the registration."""
    tasks = [spec for spec in of_this_checkout().values() if isinstance(spec, task_pb2.TaskSpec)]
    plugins = inline["tasks"]["task-plugins"]
    for task in tasks:
        assert plugins["default-for-task-types"][task.template.type] in plugins["enabled-plugins"], task.template.type


def test_what_the_connector_serves_is_routed_to_it(inline: dict[str, Any], manifests: dict) -> None:
    """Each sensor's type goes to the connector plugin and on to the service that the manifests deploy."""
    import tasks.sensors.kafka_backlog
    import tasks.sensors.kafka_window  # noqa: F401  registers its connector

    served = {connector.name for connector in ConnectorRegistry._REGISTRY}
    types, service = inline["tasks"]["task-plugins"]["default-for-task-types"], inline["plugins"]["connector-service"]
    routed = {kind for kind, plugin in types.items() if plugin == "connector-service"}
    assert routed == set(service["connectorForTaskTypes"]) == served
    for connector in service["connectorForTaskTypes"].values():
        host, port = re.fullmatch(r"dns:///([\w.-]+):(\d+)", service["connectors"][connector]["endpoint"]).groups()
        exposed = manifests["Service", host.split(".")[0]]
        assert exposed["spec"]["ports"][0]["port"] == int(port)
        assert service["connectors"][connector]["timeouts"]["GetTask"] == "10s"


def test_the_pods_of_the_manifests_are_those_of_plans_and_values(inline: dict[str, Any], manifests: dict) -> None:
    """The template that Flyte is told of, the service account of the plans, one volume at the page's home."""
    assert ("PodTemplate", inline["plugins"]["k8s"]["default-pod-template-name"]) in manifests
    plans = yaml.safe_load(SNAPSHOT.read_text())["launch plans"].values()
    for plan in plans:
        assert ("ServiceAccount", plan["security_context"]["run_as"]["k8s_service_account"]) in manifests
    pod = manifests["PodTemplate", "fednested"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    settings = example()
    assert container["name"] == "default"
    assert settings["home"].startswith(f"{mounts['home']}/")
    assert settings["identity"]["key"].startswith(f"{mounts['keys']}/")
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "fednested-home"
    assert ("PersistentVolumeClaim", "fednested-home") in manifests
    (connector,) = manifests["Deployment", "fednested-connector"]["spec"]["template"]["spec"]["containers"]
    modules = [word for word in connector["args"] if word.startswith("tasks.")]
    assert modules == re.findall(r"--modules (tasks\S+)", (ROOT / "Makefile").read_text())


def test_the_configuration_of_the_page_is_a_valid_one(tmp_path: Path) -> None:
    """An operator's first copy must not be refused for a key that has another name by now."""
    (tmp_path / "tier1.yaml").write_text(yaml.safe_dump(example()))
    config = load_yaml(tmp_path / "tier1.yaml", Tier1Config, command="")
    assert config.home_is_shared
    assert config.profile == "production"


@pytest.mark.slow
def test_what_runs_here_runs(tmp_path: Path) -> None:
    """The blocks that need no cluster are run as they stand."""
    blocks = re.findall(r"\*runs here\*\n\n```sh\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert blocks
    variables = {"SCRATCH": str(tmp_path), "PYTHONPATH": str(ROOT), "MAKEFLAGS": f"VENV={sys.prefix} STAMP="}
    for block in blocks:
        script = block.replace(".venv/bin/", f"{sys.prefix}/bin/")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=ROOT,
            env={**os.environ, **variables, "FEDNESTED_KAFKA_BOOTSTRAP": "127.0.0.1:1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Successfully packaged" in done.stdout
        assert "start the broker" in done.stdout


def test_the_page_names_targets_and_files_that_exist() -> None:
    """A renamed target or file shows here and not on somebody's first day."""
    text, makefile = PAGE.read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", text)):
        assert f"\n{target}:" in makefile, target
    for path in set(re.findall(r"\b(?:deploy|docs|workflows|tests)/[\w./-]+\w", text)):
        assert (ROOT / path).exists(), path


def example() -> dict[str, Any]:
    """The tier1.yaml of the page, with keys for its placeholders."""
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return yaml.safe_load(block.replace("<public key>", "'" + "ab" * 32 + "'"))

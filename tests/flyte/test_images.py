"""The container images: locked like the checkout, rendered as committed, the same in a pod, enough for their tasks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flytekit.configuration import SerializationSettings

from images import specs
from images.__main__ import locked, pins, roots, write
from tests.flyte.absent import lacking, run_without
from tests.flyte.packaged import ROOT, package, read

NAMES = sorted(roots())
# The packages that an image needs are those of its Python; another one here has other metadata.
OWN_PYTHON = pytest.mark.skipif(
    f"{sys.version_info.major}.{sys.version_info.minor}" != specs.PYTHON, reason=f"images have Python {specs.PYTHON}"
)


@pytest.mark.parametrize("name", NAMES)
def test_every_package_is_pinned_as_in_the_checkout(name: str) -> None:
    """What was tested here is what runs in the pod, down to the last package."""
    known = pins()
    found = dict(line.split("==") for line in getattr(specs, name).packages)
    assert {package: known[package] for package in found} == found
    assert {package.split("[")[0].lower() for package in roots()[name]} <= set(found)


@OWN_PYTHON
@pytest.mark.parametrize("name", NAMES)
def test_packages_and_dockerfile_are_the_committed_ones(name: str, tmp_path: Path) -> None:
    """A changed pin or image shows in review; an operator builds the committed context without Flyte's builder."""
    write(name, locked(roots()[name], cuda=name != "edge"), tmp_path)
    for rendered in tmp_path.iterdir():
        committed = specs.CONTEXTS / name / rendered.name
        assert rendered.read_text() == committed.read_text(), f"{committed}: if wanted, run make images-dockerfiles"


def test_the_device_gets_nothing_of_the_data_centre() -> None:
    """The edge image is asked for what the wheel asks for, and has no Flyte in it."""
    wanted = {line.split("==")[0] for line in specs.edge.packages}
    assert not wanted & {"flytekit", "mlflow-skinny", "acryl-datahub", "pandas", "nvidia-cublas"}
    assert "torch" in wanted


def test_the_registry_comes_from_the_environment() -> None:
    """A platform engineer points all images to a registry with one variable."""
    done = python(
        "from images import specs; print(specs.control.image_name(), specs.tier1.image_name())",
        FEDNESTED_REGISTRY="ghcr.io/acme",
    )
    assert done.stdout.count("ghcr.io/acme/fednested-") == 2


def test_a_router_in_its_pod_finds_the_images_of_the_registration(tmp_path: Path) -> None:
    """What a `@dynamic` starts has the registered images, baked or not, else nobody has them."""
    for copy, bake in (("all", {}), ("none", {"FEDNESTED_BAKE": "1"})):
        # Without the GPU modules, which take seconds to import.
        loops = ("workflows.nested_round",)
        package(tmp_path / copy, modules=loops, copy=copy, FEDNESTED_REGISTRY="ghcr.io/acme", **bake)
        entities = read(tmp_path / copy)
        registered = {image(entities[name]) for name in ("tasks.promotion.settle", "tasks.failures.broadcast_failed")}
        routers = [entities[name] for name in ("workflows.nested_round.slow_loop", "tasks.control.decision.ask_secops")]
        settings, other = ({pair.key: pair.value for pair in router.template.container.env} for router in routers)
        assert settings == other
        known = SerializationSettings.from_transport(settings.pop("_F_SS_C")).image_config
        in_pod = python("from images import specs; print(specs.tier1.id, specs.control.id)", **settings)
        found = [known.find_image(identity) for identity in in_pod.stdout.split()]
        assert {each.full for each in found if each} == registered, copy


def test_a_production_image_has_the_code_that_tasks_import_when_they_run(tmp_path: Path) -> None:
    """Baked code is all of it, and neither tests nor keys; flytekit's own choice has only what registering loads."""
    key = ROOT / "forgotten.key"
    program = f"""
from pathlib import Path
from flytekit.image_spec.default_builder import create_docker_context
from images import specs
create_docker_context(specs.control, Path({str(tmp_path)!r}))
"""
    key.write_text("secret")
    try:
        python(program, FEDNESTED_BAKE="1")
    finally:
        key.unlink()
    baked = {str(path.relative_to(tmp_path / "src")) for path in (tmp_path / "src").rglob("*") if path.is_file()}
    assert {"tier1/loops/core_update.py", "fednested_lib/delta.py", "images/dockerfiles/control/Dockerfile"} <= baked
    assert not [path for path in baked if path.startswith(("tests/", "benchmarks/", ".git/")) or path.endswith(".key")]
    assert "COPY --chown=flytekit ./src /root" in (tmp_path / "Dockerfile").read_text()


def test_a_changed_package_changes_the_tag() -> None:
    """Also one that another package brought along: what the tag does not see would change under it."""
    first = specs.control.packages[0]
    other = replace(specs.control, packages=[f"{first}.post1", *specs.control.packages[1:]])
    assert other.tag != specs.control.tag


def test_an_image_that_cannot_be_looked_up_is_an_error_where_it_matters(tmp_path: Path) -> None:
    """`make register-prod` sets FLYTE_IMG_FAST_FAIL; without it flytekit takes the image for built and goes on."""
    archive = tmp_path / "package.tgz"
    with pytest.raises(AssertionError, match="failed to check if the image exists"):
        package(archive, modules=("workflows.broadcast",), FEDNESTED_REGISTRY="localhost:1", FLYTE_IMG_FAST_FAIL="1")


def test_registration_needs_no_torch() -> None:
    """A machine that registers, and the control image, import every workflow without torch or transformers."""
    run_without(("torch", "transformers", "deepspeed", "peft"), "import launchplans.schedules, tasks.promotion")


def test_the_connector_image_is_enough_for_what_it_serves() -> None:
    """A look at a window, and the trigger, import nothing that the connector image lacks."""
    program = """
import services.trigger.__main__, services.trigger.remote
import flytekit.extend.backend.connector_service, grpc_health, prometheus_client
import tasks.sensors.kafka_backlog
from tasks.sensors.kafka_window import KafkaWindowConnector, WindowMeta
from tier1.federation import open_log
from fednested_lib.config import LogConfig
from tier1.loops.records import Window
open_log(LogConfig(bootstrap="memory:x")).create_topics({"t": 1})
window = Window(bootstrap="memory:x", topic="t", log_id="", generation=0, offsets={"0": 0}, last_offsets={},
                last_digests={}, opened_at=0.0, min_updates=1, max_wait_s=1.0, max_bytes=1, max_updates=1)
print(KafkaWindowConnector().get(WindowMeta(window=window)).outputs["o0"])
"""
    assert "n_records=0, generation=0, closed_by='time'" in run_without(lacking(specs.connector), program)


def image(spec: Any) -> str:
    return spec.template.container.image


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], **variables}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )

"""The container images: pinned like the checkout, renderable without a builder, and enough for the tasks they run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from flytekit.image_spec.default_builder import create_docker_context

from images import specs

ROOT = Path(__file__).resolve().parents[2]


def constraints() -> dict[str, str]:
    """Pins of constraints.txt that hold on the images' Python."""
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    image = {"python_version": specs.PYTHON, "python_full_version": f"{specs.PYTHON}.0"}
    return {pin.name.lower(): str(pin.specifier) for pin in pins if not pin.marker or pin.marker.evaluate(image)}


@pytest.mark.parametrize("spec", [specs.control, specs.tier1, specs.connector], ids=lambda spec: spec.name)
def test_pins_are_those_of_the_checkout(spec) -> None:
    """What was tested here is what runs in the pod."""
    pins = constraints()
    for package in spec.packages:
        name, version = re.fullmatch(r"([a-z0-9-]+)(==.+)", package).groups()
        assert pins[name] == version, name


@pytest.mark.parametrize("spec", [specs.control, specs.tier1, specs.connector], ids=lambda spec: spec.name)
def test_a_dockerfile_can_be_rendered_offline(spec, tmp_path: Path) -> None:
    """An operator without Flyte's builder can build the image from the rendered context."""
    create_docker_context(spec, tmp_path)
    rendered = "".join(path.read_text() for path in tmp_path.iterdir() if path.is_file())
    assert f"python={specs.PYTHON}" in rendered
    for package in spec.packages:
        assert package in rendered


def test_the_registry_comes_from_the_environment() -> None:
    """A platform engineer points all images to a registry with one variable."""
    program = "from images import specs; print(specs.control.image_name(), specs.tier1.image_name())"
    environment = {"FEDNESTED_REGISTRY": "ghcr.io/acme", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("ghcr.io/acme/fednested-") == 2


def test_registration_needs_no_torch() -> None:
    """A machine that registers, and the control image, import every workflow without torch or transformers."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'deepspeed', 'peft']));"
        "import launchplans.schedules, tasks.training, tasks.promotion"
    )
    subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, cwd=ROOT, check=True
    )


def test_the_connector_image_is_enough_for_what_it_serves() -> None:
    """A look at a window, and the trigger, import nothing that the connector image lacks."""
    program = """
import sys
from importlib.machinery import PathFinder
ABSENT = ("torch", "transformers", "tokenizers", "safetensors", "pandas", "pandera")
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import services.trigger.__main__, services.trigger.remote
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
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "n_records=0, generation=0, closed_by='time'" in done.stdout, done.stderr[-2000:]

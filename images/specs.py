"""The container images, as objects: third-party packages only.

    control    the chain, the log and governance; no torch: seconds to start
    tier1      control's packages plus torch and what trains, folds and evaluates a model
    connector  control's packages plus what `pyflyte serve connector` and the trigger need
    edge       what the wheel needs, with PyTorch's CPU build: no task runs in it, a device's image begins with it

Every package is pinned, what packages need themselves included: the tag of an image is a hash of its specification, so
that an unpinned one would change under an unchanged tag. The pins are those of constraints.txt, written to
`images/dockerfiles/<name>` with the rendered Dockerfile by `make images-dockerfiles`.

The repository's code is shipped by Flyte with every registration (`--copy all`), or, with FEDNESTED_BAKE=1, is part of
the image, and then of its tag: all of it, because tasks import most of it when they run, where flytekit's own choice
(what is loaded at registration) would leave it out.
"""

import os
from pathlib import Path

from flytekit import ImageSpec
from flytekit.constants import CopyFileDetection

# Both are read at import, against the house rule: Flyte reads image names while it imports the task modules.
REGISTRY = os.environ.get("FEDNESTED_REGISTRY", "localhost:30000")
BAKE = os.environ.get("FEDNESTED_BAKE", "")
# A router looks up images by their specification again, in its pod: there it must be what it was at registration.
ROUTER_ENVIRONMENT = {"FEDNESTED_REGISTRY": REGISTRY} | ({"FEDNESTED_BAKE": BAKE} if BAKE else {})

PYTHON = "3.11"
CONTEXTS = Path(__file__).with_name("dockerfiles")

CONTROL = (
    "acryl-datahub",
    "confluent-kafka",
    "cramjam",
    "cryptography",
    "flytekit",
    "fsspec",
    "mlflow-skinny",  # the client: the whole of mlflow brings pandas, scikit-learn and a web server
    "numpy",
    "pydantic",
    "pyyaml",
    "structlog",
)
CONNECTOR = (*CONTROL, "grpcio-health-checking", "prometheus-client", "typer")
TIER1 = (
    *CONTROL,
    "deepspeed",  # has no wheel: built from source, without any of its compiled operators
    "flytekitplugins-kfpytorch",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "pandera",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
)


def _image(name: str, **options: object) -> ImageSpec:
    if BAKE:  # the root is relative, so that pod and registering machine make the same of it
        options |= {"source_copy_mode": CopyFileDetection.ALL, "source_root": "."}
    packages = (CONTEXTS / name / "requirements_uv.txt").read_text(encoding="utf-8").split()
    return ImageSpec(name=f"fednested-{name}", registry=REGISTRY, python_version=PYTHON, packages=packages, **options)


control = _image("control")
tier1 = _image("tier1")
connector = _image("connector")
edge = _image(
    "edge",
    pip_extra_index_url=["https://download.pytorch.org/whl/cpu"],
    pip_extra_args="--index-strategy unsafe-best-match",  # the pins decide, whichever index has them
)

"""The container images, as objects: third-party packages only, the repository's own code is shipped by Flyte.

    control    the chain, the log and governance; no torch: seconds to start
    tier1      control's packages plus torch and what trains, folds and evaluates a model
    connector  control's packages plus what `pyflyte serve connector` needs: the service that looks for the sensors

Every version is pinned, flytekit included: the tag of an image is a hash of its specification, so an unpinned package
would change under an unchanged tag. `tests/flyte/test_images.py` holds the pins equal to constraints.txt.
"""

import os

from flytekit import ImageSpec

# Read at import, against the house rule: Flyte reads image names while it imports the task modules.
REGISTRY = os.environ.get("FEDNESTED_REGISTRY", "localhost:30000")
PYTHON = "3.11"

CONTROL_PACKAGES = [
    "acryl-datahub==1.7.0.17",
    "confluent-kafka==2.16.1",
    "cramjam==2.14.0",
    "cryptography==50.0.2",
    "flytekit==1.16.31",
    "fsspec==2026.9.0",
    "mlflow==3.17.2",
    "numpy==2.4.6",
    "pydantic==2.14.3",
    "pyyaml==6.0.3",
    "structlog==26.1.0",
]
CONNECTOR_PACKAGES = [*CONTROL_PACKAGES, "grpcio-health-checking==1.85.1", "prometheus-client==0.26.0"]
TIER1_PACKAGES = [
    *CONTROL_PACKAGES,
    "flytekitplugins-kfpytorch==1.16.31",
    "pandas==3.1.1",
    "pandera==0.35.0",
    "pyarrow==25.0.1",
    "safetensors==0.8.0",
    "tokenizers==0.23.3",
    "torch==2.13.0",
    "tqdm==4.70.1",
    "transformers==5.23.0",
]

control = ImageSpec(name="fednested-control", registry=REGISTRY, python_version=PYTHON, packages=CONTROL_PACKAGES)
tier1 = ImageSpec(name="fednested-tier1", registry=REGISTRY, python_version=PYTHON, packages=TIER1_PACKAGES)
connector = ImageSpec(name="fednested-connector", registry=REGISTRY, python_version=PYTHON, packages=CONNECTOR_PACKAGES)

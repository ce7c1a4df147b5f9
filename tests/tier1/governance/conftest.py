"""Facts of a small federation that several governance tests describe to lineage and registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from services.embedded import EmbeddedMlflow
from tier1.governance.ports import ModelVersion, Registered


@pytest.fixture
def made() -> Callable[..., ModelVersion]:
    """Make version `k` of a chain; equal arguments give equal bytes."""

    def make(version: int, **changes) -> ModelVersion:
        facts = {
            "version": version,
            "manifest": b'{"seq":%d}' % version,
            "snapshot": b'{"blobs":%d}' % version,
            "weights_digest": f"{version:064x}",
            "chain_head": f"{version:064d}",
            "policy_decision": "d" * 64,
            "losses": {"hamlet": 2.5 - version / 10, "the tempest": 2.0},
        }
        return ModelVersion(**{**facts, **changes})

    return make


@pytest.fixture
def registered() -> Callable[..., Registered]:
    """Make a registry entry as MLflow would return it."""

    def make(number: str = "3", platform: str = "mlflow") -> Registered:
        return Registered(
            platform=platform,
            number=number,
            run_id=f"run-{number}",
            source=f"models:/m-{number}",
            tags={"version": number, "manifest_digest": "ab" * 32},
        )

    return make


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a real MLflow server for the session; use fresh model names."""
    with EmbeddedMlflow(tmp_path_factory.mktemp("mlflow")) as server:
        yield server.uri

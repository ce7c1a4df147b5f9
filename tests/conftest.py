"""Fixtures that several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from services.embedded import bootstrap_servers

# A busy machine must not fail a property for being slow: tests are bounded by the suite, not by the example.
hypothesis.settings.register_profile(
    "fednested", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fednested")


@pytest.fixture(scope="session")
def kafka_bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """FEDNESTED_KAFKA_BOOTSTRAP, else a real embedded broker for the whole session: use topic names of your own."""
    with bootstrap_servers(tmp_path_factory.mktemp("broker")) as servers:
        yield servers

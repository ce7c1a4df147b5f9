"""One planted drift, unattended; the figure `data_engine.drift_to_candidate` plants five."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flyte.drift import drift_to_candidate


@pytest.mark.slow
def test_a_planted_drift_becomes_one_candidate_unattended(tmp_path: Path, kafka_bootstrap: str) -> None:
    """Telemetry on a real broker → data engine → trigger → a round in a process of its own → one candidate."""
    found = drift_to_candidate(tmp_path, kafka_bootstrap, seed=1)
    assert (found.tasks, len(found.admitted), found.candidates, found.waiting) == (["north"], 1, 1, 1)

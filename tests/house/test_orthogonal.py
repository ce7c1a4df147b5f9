"""A small version of the rows `orthogonal.*`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import orthogonal
from benchmarks.forgetting import domain_texts
from benchmarks.orthogonal import Domains, Variant, losses_of
from benchmarks.world import Sizes


def test_domains_arrive_and_only_protection_tells_the_runs_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first domain learns the same with and without, for there is nothing to protect; from the second on not."""
    texts = {name: ["".join(rows)[:40_000]] for name, rows in domain_texts().items()}
    monkeypatch.setattr(orthogonal, "domain_texts", lambda: texts)
    monkeypatch.setattr(orthogonal, "DOMAINS", ("python", "yaml"))
    sizes = Sizes(n_devices=2, core_steps=20, local_steps=3, suite_tokens=64, judge_tokens=256)
    world = Domains(tmp_path, 0, sizes)
    plain = losses_of(world, "plain", Variant(), rounds=1)
    protected = losses_of(world, "protected", Variant(orthogonal={"versions": 1, "rank": 8}), rounds=1)
    assert plain.shape == (3, 3)  # after tier 1 and each domain; tier 1's text and each domain's
    assert plain[1, 1] < plain[0, 1]
    np.testing.assert_array_equal(plain[:2], protected[:2])
    assert (plain[2] != protected[2]).all()

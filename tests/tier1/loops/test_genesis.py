"""How a chain begins: whose text it may read, and where in the log it starts."""

from __future__ import annotations

import pytest

from fednested_lib.errors import PolicyDenied
from tests.federation import make_federation
from tier1.loops.aggregate_experts import take_updates


def test_genesis_needs_a_policy_that_allows_its_text(tmp_path):
    """The first cut of a fresh home trains a tokenizer on governed text: with nothing allowed no chain comes about."""
    fed = make_federation(tmp_path)
    (tmp_path / "policy.yaml").write_text("version: 1\n")
    with pytest.raises(PolicyDenied, match="dataset:plays"):
        take_updates(fed)
    assert not fed.chain.exists()

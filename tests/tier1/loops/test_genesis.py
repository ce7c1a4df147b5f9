"""How a chain begins: whose text it may read, and where in the log it starts."""

from __future__ import annotations

import pytest

from fednested_lib.errors import PolicyDenied
from tests.federation import Device, make_federation
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.versions.candidates import load_candidate


def test_genesis_needs_a_policy_that_allows_its_text(tmp_path):
    """The first cut of a fresh home trains a tokenizer on governed text: with nothing allowed no chain comes about."""
    fed = make_federation(tmp_path)
    (tmp_path / "policy.yaml").write_text("version: 1\n")
    with pytest.raises(PolicyDenied, match="dataset:plays"):
        take_updates(fed)
    assert not fed.chain.exists()


def test_a_new_chain_on_an_old_topic_consumes_no_history(tmp_path):
    """A second chain on the same log begins where the topic stood; a foreign update that comes later is refused."""
    old = make_federation(tmp_path / "old", bootstrap="memory:shared")
    assert take_updates(old).n_records == 0  # makes genesis
    Device(old, "ann").send()
    new = make_federation(tmp_path / "new", bootstrap="memory:shared")
    assert take_updates(new).n_records == 0
    assert sum(new.chain.entries()[0].entry.body.offsets.values()) == 1
    Device(new, "ann").send()
    Device(new, "bob").send(federation="other")
    ref = fold_updates(new, take_updates(new))
    candidate = load_candidate(new.home, ref.digest)
    assert [row.client_id for row in candidate.accepted] == ["ann"]
    assert [row.reason for row in candidate.refused] == ["foreign_federation"]
    assert take_updates(old).n_records == 3

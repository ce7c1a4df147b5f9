from __future__ import annotations

import pytest

from fednested_lib.errors import ChainError
from tests.tier1.versions.scene import gate_record
from tier1.versions.audit import audit


def test_audit_tells_who_contributed_and_what_was_refused(scene):
    """The rows of a version are its accepted updates with their weights and its refused records with their reasons."""
    scene.send("ada", 0)
    scene.send("bob", 0, n_tokens=384)
    scene.send("eve", 0)
    scene.settle(scene.fold(scene.cut()), gate=lambda c: gate_record(c, c.rates.eta_t2 < 1))
    scene.decide("approve", 1)
    report = audit(scene.chain, 1)
    rows = {row.who: row for row in report.rows}
    assert (rows["ada"].weight, rows["bob"].weight) == (0.25, 0.75)
    assert (rows["eve"].kind, rows["eve"].reason) == ("refused", "unknown_client")
    assert rows["ada"].source.startswith("updates.experts.local[")
    assert (report.standing, report.tries, report.parent_version) == (
        ("head", "champion", "approved"),
        ("gate_failed", "passed"),
        0,
    )


def test_audit_of_a_core_update_and_of_genesis(scene):
    """A core update has one row, its training run; genesis has none."""
    scene.settle(scene.fold(scene.dense("run-1")))
    scene.decide("reject", 1)
    (row,) = audit(scene.chain, 1).rows
    assert (row.kind, row.who, row.tokens) == ("dense", "trainer", 100)
    assert audit(scene.chain, 1).standing == ("rejected", "voided")
    assert audit(scene.chain, 0).rows == ()
    with pytest.raises(ChainError, match=r"version must be one of 0\.\.1, got 2"):
        audit(scene.chain, 2)

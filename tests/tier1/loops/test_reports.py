"""What SecOps reads before deciding is safe in a browser."""

from __future__ import annotations

from tier1.loops.reports import gate_html
from tier1.versions.manifest import GateRecord, SuiteChange, Try
from tier1.versions.settings import Rates


def test_the_deck_escapes_names_and_has_no_script():
    """Guards decks: a suite name from a configuration cannot become markup, and a loss that is missing is a dash."""
    rows = [
        SuiteChange(suite="<script>x", before=4.0, after=None, bound=0.1, passed=False),
        SuiteChange(suite="b", before=4.0, after=4.5, bound=0.1, passed=False),
    ]
    gate = GateRecord(candidate="c" * 64, passed=False, reason="suite <script>x: loss is missing", rows=rows)
    tried = Try(rates=Rates(), parent="a" * 64, candidate="c" * 64, outcome="gate_failed", gate=gate)
    page = gate_html([tried], gate)
    assert "<script" not in page
    assert "&lt;script&gt;x" in page
    assert "<td>–</td>" in page
    assert "<td>+0.5000</td>" in page
    assert "failed" in page

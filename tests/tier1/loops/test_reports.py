"""What SecOps reads before deciding is safe in a browser."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tests.federation import Device, make_federation
from tier1.commands import app
from tier1.evaluation.utilisation import expert_use
from tier1.federation import Federation
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import settle_candidate
from tier1.loops.records import CandidateRef, Settled
from tier1.loops.reports import PAGE_BYTES, contributors_html, evaluation_html, gate_html, use_html
from tier1.versions.candidates import load_candidate, save_candidate
from tier1.versions.manifest import GateRecord, Refused, SuiteChange, Try
from tier1.versions.settings import Rates

FLYTE_PAGE_BYTES = 4_000  # the template, measured: 3,458, and its navigation
LEFT_OUT = re.compile(r"(\d+) of (\d+) rows are left out; all of them: <code>fednested (tier1 audit .*?)</code>")


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


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Settled]:
    """A federation with one folded update and one refused, whose version waits for a decision."""
    fed = make_federation(tmp_path_factory.mktemp("federation"))
    settle_candidate(fed, fold_dense(fed, train_delta(fed, pack_datasets(fed, authorise_training(fed, "r")), "r")))
    Device(fed, "ann").send(base=0)
    Device(fed, "bob").send(base=0, payload_bytes=1)
    return fed, settle_candidate(fed, fold_updates(fed, take_updates(fed)))


def grown(fed: Federation, made: Settled, count: int) -> str:
    """Store the candidate as if `count` devices had been accepted and as many refused, with the longest names."""
    candidate = load_candidate(fed.home, made.candidate)
    accepted = [
        candidate.accepted[0].model_copy(update={"client_id": f"{i:0>63}", "sequence": i, "trust": 0.5})
        for i in range(count)
    ]
    refused = [
        Refused(partition=0, offset=i, record_sha256="a" * 64, reason=f"reason_{i % 500:0>50}", detail='<&"é' * 100)
        for i in range(count)
    ]
    return save_candidate(fed.home, candidate.model_copy(update={"accepted": accepted, "refused": refused}))


def test_decks_of_ten_thousand_updates_stay_below_the_bound(settled: tuple[Federation, Settled]) -> None:
    """Contributors and losses together fit a page of 100 kB; the command that a deck names prints every row."""
    fed, made = settled
    digest = grown(fed, made, 10_000)
    deck = contributors_html(fed, CandidateRef(digest=digest, parent_version=1, n_accepted=10_000, n_refused=10_000))
    rows = [
        SuiteChange(
            **{"suite": f"<{i}>" * 20, "before": 4.0, "after": 4.5 if i == 9_999 else 4.0, "bound": 0.1},
            **{"passed": i < 9_999, "change_interval": (-0.1, 0.1), "after_interval": (3.0, 5.0), "accuracy": 0.5},
        )
        for i in range(10_000)
    ]
    gate = GateRecord(candidate=digest, passed=False, reason="<worst> " * 1000, rows=rows)
    tried = Try(rates=Rates(), parent="a" * 64, candidate=digest, outcome="gate_failed", gate=gate)
    regression = gate_html([tried] * 16, gate)
    shares = {f"<{i}>" * 20: {str(layer): list(range(128)) for layer in range(48)} for i in range(10)}
    experts = use_html(expert_use(shares), digest)
    assert "Experts: 336 dead, 0 overloaded, 0 specialised of 6144" in experts
    assert "<td>–</td>" not in experts, "what stands out comes first, the rest is left out"
    assert "of 6144 rows are left out" in experts
    # The table since the champion, of the same suites, is narrower than the gate's.
    assert len((deck + experts + regression * 2).encode()) <= PAGE_BYTES - FLYTE_PAGE_BYTES
    assert "10000 accepted, 10000 refused" in deck
    assert regression.index("<td>failed</td>") < regression.index("<td>ok</td>"), "what failed is never left out"
    found = LEFT_OUT.findall(deck)
    assert [int(total) for _, total, _ in found] == [10_000, 500, 10_000]
    shown = deck.count("<td>v0</td>")
    assert int(found[0][0]) == 10_000 - shown
    assert shown >= 50
    command = found[0][2].replace("tier1.yaml", str(fed.config.governance.policy.parent / "tier1.yaml")).split()
    printed = CliRunner().invoke(app, command[1:]).output
    assert printed.count("  accepted  ") == printed.count("  refused   ") == 10_000


def test_the_decks_say_what_changed_what_was_refused_and_where_it_is_recorded(settled: tuple[Federation, Settled]):
    """Who decides sees loss before and after, bound and verdict, reasons with counts, and where it is recorded."""
    fed, made = settled
    shown, folded = evaluation_html(fed, made), contributors_html(fed, made)
    assert "<th>before</th><th>after</th><th>change</th><th>bound</th>" in shown
    assert re.search(r"<td>plays</td>(<td>[^<]+</td>){7}<td>ok</td>", shown)
    assert str(fed.home / "registry.json") in shown
    assert f"lineage.jsonl</code>, lines with manifest_digest {made.manifest}" in shown
    assert "1 accepted, 1 refused" in folded
    assert re.search(r"<th>refused for</th><th>updates</th></tr><tr><td>[a-z_]+</td><td>1</td>", folded)
    assert "left out" not in shown + folded
    assert "<script" not in shown + folded


@pytest.mark.parametrize(
    ("uri", "link"),
    [
        ("https://mlflow.example:5000/", 'href="https://mlflow.example:5000/#/models/fednested-moe"'),
        ("javascript:alert(1)", None),
    ],
)
def test_only_a_server_becomes_a_link(settled: tuple[Federation, Settled], uri: str, link: str | None):
    """A registry with a web page is one click away; an address of another kind is no link."""
    fed, made = settled
    registry = fed.config.registry.model_copy(update={"uri": uri})
    elsewhere = replace(fed, config=fed.config.model_copy(update={"registry": registry}))
    page = evaluation_html(elsewhere, made)
    assert (link in page) if link else ("href" not in page)


def test_a_settled_candidate_is_audited_with_its_suites(settled: tuple[Federation, Settled]):
    """The command that a deck names tells the losses too, of a version or of what the gate refused."""
    fed, made = settled
    config = str(fed.config.governance.policy.parent / "tier1.yaml")
    audited = CliRunner().invoke(app, ["audit", "--config", config, "--candidate", made.candidate]).output
    assert re.search(r"  suite     plays  before \d\.\d+  after \d\.\d+  bound 0\.5  ok  change .*  accuracy ", audited)
    assert "  refused   " in audited
    for wrong, says in ((["--candidate", "ab"], "neither on disk nor in the chain"), ([], "give one of them")):
        assert says in str(CliRunner().invoke(app, ["audit", "--config", config, *wrong]).exception)

"""Suites measured one by one: the gate finds them, and a suite that could not be measured passes nothing."""

from __future__ import annotations

import pytest

from fednested_lib.errors import DataError
from tests.federation import make_workspace, write_text
from tier1.evaluation import measured
from tier1.federation import Federation, open_federation
from tier1.loops import evaluate_suites
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import registered_suites, settle_candidate, suite_registry
from tier1.loops.records import CandidateRef, SuiteLoss


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, CandidateRef]:
    """A federation with three suites, two of them registered by an earlier configuration, and one candidate."""
    directory = tmp_path_factory.mktemp("federation")
    fed = open_federation(make_workspace(directory))
    suite_registry(fed).register(
        {name: write_text(directory / f"{name}.jsonl", 40, seed) for seed, name in enumerate(("a", "b"), 3)}
    )
    return fed, fold_dense(fed, train_delta(fed, pack_datasets(fed, authorise_training(fed, "r1")), "r1"))


def test_a_suite_that_is_altered_fails_alone_and_the_gate_is_closed(folded: tuple[Federation, CandidateRef]) -> None:
    """Of three suites two are measured; the gate neither skips the third nor lets the candidate through."""
    fed, candidate = folded
    suites = ["a", "b", "plays"]
    assert evaluate_suites.plan_suites(fed, "") == (candidate.digest, suites)
    copy = registered_suites(fed)["b"].path
    content = copy.read_bytes()
    copy.write_bytes(content[:-1])
    losses = [evaluate_suites.measure_suite(fed, candidate.digest, name) for name in ("a", "plays")]
    with pytest.raises(DataError, match="suite 'b' must have digest"):
        evaluate_suites.measure_suite(fed, candidate.digest, "b")
    report = evaluate_suites.collect(candidate.digest, suites, [losses[0], None, losses[1]])
    assert (len(report.losses), report.missing) == (2, ["b"])
    with pytest.raises(DataError, match="suite 'b' must have digest"):
        settle_candidate(fed, candidate)
    assert fed.chain.state().head.version == 0
    copy.write_bytes(content)


def test_the_gate_finds_what_was_measured(
    folded: tuple[Federation, CandidateRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is built for suites that were measured elsewhere, and the gate's figures are those."""
    fed, candidate = folded
    digest, suites = evaluate_suites.plan_suites(fed, "")
    losses = {name: evaluate_suites.measure_suite(fed, digest, name) for name in suites}
    monkeypatch.setattr(measured, "build_model", None)
    assert settle_candidate(fed, candidate).status == "head"
    rows = fed.chain.entries()[-1].entry.body.tries[-1].gate.rows
    assert {row.suite: (row.before, row.after) for row in rows} == {n: (x.before, x.after) for n, x in losses.items()}
    assert evaluate_suites.plan_suites(fed, "") == ("", [])


def test_the_deck_names_what_is_missing_and_escapes_it() -> None:
    """The largest rise stands first; a name is text, never markup."""
    losses = [SuiteLoss(suite="a", before=2.0, after=1.0), SuiteLoss(suite="b", before=1.0, after=2.0), None]
    html = evaluate_suites.measured_html(evaluate_suites.collect("c", ["a", "b", "<i>"], losses))
    assert "Missing: &lt;i&gt;." in html
    assert html.index("<td>b</td>") < html.index("<td>a</td>")

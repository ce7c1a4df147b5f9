"""Suites measured one by one: the gate finds them, and a suite that could not be measured passes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from fednested_lib.errors import ConfigError, DataError
from tests.federation import make_federation, make_workspace, write_text
from tier1.evaluation import measured
from tier1.federation import Federation, open_federation
from tier1.loops import evaluate_suites
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import settle_candidate
from tier1.loops.gate_candidate import gate_candidate, kept_use, measure, registered_suites, suite_registry
from tier1.loops.records import CandidateRef, SuiteLoss
from tier1.versions.candidates import load_candidate


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


def test_a_suite_that_was_judged_cannot_be_dropped(folded: tuple[Federation, CandidateRef]) -> None:
    """The chain remembers what the gate judged: whoever deletes a registration closes the gate and opens nothing."""
    fed, candidate = folded
    assert settle_candidate(fed, candidate).status == "head"
    entry = fed.home / "suites/a.json"
    content = entry.read_bytes()
    entry.unlink()
    with pytest.raises(DataError, match=r"suite 'a' was judged by the gate before and is not registered any more"):
        gate_candidate(fed, load_candidate(fed.home, candidate.digest))
    other = fed.home / "other.jsonl"
    other.write_text('{"text": "something that is easier to guess"}\n' * 40)
    suite_registry(fed).register({"a": other})
    with pytest.raises(DataError, match=r"judged by the gate with digest .* other text needs another name"):
        gate_candidate(fed, load_candidate(fed.home, candidate.digest))
    entry.write_bytes(content)
    assert gate_candidate(fed, load_candidate(fed.home, candidate.digest)).passed


def test_a_bound_of_a_suite_is_its_own(tmp_path: Path) -> None:
    """The gate holds one suite against its own bound and the others against the default, and records what it used."""
    fed = make_federation(
        tmp_path, evaluation={"max_regression": 100.0, "bounds": {"plays": {"max_regression": 0.0, "judged_by": "low"}}}
    )
    candidate = fold_dense(fed, train_delta(fed, pack_datasets(fed, authorise_training(fed, "r1")), "r1"))
    extra = suite_registry(fed)
    extra.register({"other": write_text(tmp_path / "other.jsonl", 40, 5)})
    rows = gate_candidate(fed, load_candidate(fed.home, candidate.digest)).rows
    assert [(row.suite, row.bound, row.judged_by) for row in rows] == [("other", 100.0, "mean"), ("plays", 0.0, "low")]
    assert all(row.change_interval[0] < row.after - row.before < row.change_interval[1] for row in rows)
    assert all(0 <= row.accuracy <= 1 and row.completions is None for row in rows)


def test_a_bound_for_an_unknown_suite_is_refused(tmp_path: Path) -> None:
    """A misspelt name would leave its suite with the default bound, unseen."""
    fed = make_federation(tmp_path, evaluation={"bounds": {"play": {"max_regression": 0.0}}})
    with pytest.raises(ConfigError, match=r"evaluation.bounds names suite 'play', registered are plays: fix the name"):
        registered_suites(fed)


def test_a_measurement_of_an_earlier_form_is_made_again(
    folded: tuple[Federation, CandidateRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a release without row figures kept is never read as if it had them."""
    fed, _ = folded
    snapshot = fed.chain.state().head.snapshot
    found = measure(fed, snapshot)
    monkeypatch.setattr(measured, "FORM", measured.FORM + 1)
    assert kept_use(fed, snapshot) == []
    assert measure(fed, snapshot) == found


def test_the_deck_names_what_is_missing_and_escapes_it() -> None:
    """The largest rise stands first; a name is text, never markup."""
    losses = [SuiteLoss(suite="a", before=2.0, after=1.0), SuiteLoss(suite="b", before=1.0, after=2.0), None]
    html = evaluate_suites.measured_html(evaluate_suites.collect("c", ["a", "b", "<i>"], losses))
    assert "Missing: &lt;i&gt;." in html
    assert html.index("<td>b</td>") < html.index("<td>a</td>")

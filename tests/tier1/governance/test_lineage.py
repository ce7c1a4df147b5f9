"""What we tell DataHub is valid, connected, and said once."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fednested_lib.errors import GovernanceError
from fednested_lib.signing import Signer
from tests.tier1.governance.mcp_check import check_proposal
from tier1.governance import lineage_urns as urns
from tier1.governance.approvals import issue, parse_decision
from tier1.governance.lineage import MadeVersion, Run, Source, promotion_event, run_event, version_event
from tier1.governance.lineage_outbox import LineageOutbox
from tier1.governance.ports import AccessDecision, AccessRequest, LineageEvent, Registered

MANIFEST = "ab" * 32
SAM = Signer.from_seed(b"s" * 32)
CUT = Source(platform="kafka", name="updates.experts.local", digest="0c" * 32, detail={"log": "c1/t1", "0": "0-7"})
DATASET = Source(platform="file", name="clinic-a/notes", digest="0d" * 32)


def _run(kind: str = "aggregate_experts", run_id: str = "fold-3", **changes) -> Run:
    facts = {
        "federation": "shakespeare",
        "principal": "svc-trainer",
        "inputs": [CUT],
        "upstream_runs": ["fold-2"],
        "access_decisions": ["d" * 64],
        "parameters": {"eta_t2": 1.0, "rule": "weighted_mean"},
        "metrics": {"accepted": 7},
        "started_ms": 1_000,
        "finished_ms": 1_250,
    }
    return Run(kind=kind, run_id=run_id, **{**facts, **changes})


def _events(registered: Callable[..., Registered]) -> dict[str, LineageEvent]:
    made = MadeVersion(
        model_name="moe",
        registered=registered(),
        version=3,
        manifest_digest=MANIFEST,
        run_id="fold-3",
        principal="svc-trainer",
        losses={"hamlet": 2.1},
        made_ms=1_300,
    )
    training = _run(
        "core_update",
        "core-1",
        inputs=[DATASET],
        outputs=[Source(platform="kafka", name="updates.tier1", digest="0e" * 32)],
    )
    return {
        "core_update": run_event(training),
        "aggregate_experts": run_event(_run()),
        "version": version_event(made),
        "approve": _promotion("approve", registered),
        "reject": _promotion("reject", registered),
        "approve without registry": _promotion("approve", lambda number="": None),
    }


def _promotion(verdict: str, registered: Callable[..., Registered | None]) -> LineageEvent:
    token = issue(
        SAM, verdict=verdict, manifest_digest=MANIFEST, approver="sam", issued_at=1, reason="words of a person"
    )
    request = AccessRequest(principal="sam", action="promote", resource="model:moe")
    return promotion_event(
        model_name="moe",
        version=3,
        run_id="fold-3",
        decision=parse_decision(token, {SAM.public_key: "sam"}, manifest_digest=MANIFEST),
        access=AccessDecision(request=request, allowed=True, reason="rule p", rule="p", policy="test"),
        registered=registered(),
        previous=registered("2"),
        decided_ms=1_400,
    )


def _aspect(event: LineageEvent, urn: str, name: str) -> dict:
    (found,) = [p for p in event.proposals if p["entityUrn"] == urn and p["aspectName"] == name]
    return found["aspect"]["json"]


def _edges(event: LineageEvent, urn: str, side: str) -> set[str]:
    aspect = _aspect(event, urn, f"dataProcessInstance{side.capitalize()}")
    return {edge["destinationUrn"] for edge in aspect[f"{side}Edges"]}


def test_everything_we_emit_is_valid(registered):
    """The strict check has nothing to say about any proposal of any event."""
    events = _events(registered)
    problems = {
        (name, problem) for name, event in events.items() for p in event.proposals for problem in check_proposal(p)
    }
    assert not problems
    assert sum(len(event.proposals) for event in events.values()) > 40


def _plant(proposal: dict, path: tuple, value) -> dict:
    planted = copy.deepcopy(json.loads(json.dumps(proposal)))
    place = planted
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return planted


PLANTED = {
    "unknown aspect": ("dataProcessInstanceInput", ("aspectName",), "dataProcessInstanceInputs", "unknown aspect"),
    "aspect of another entity": ("status", ("aspectName",), "mlModelProperties", "not allowed on entity 'dataset'"),
    "unknown field": ("versionProperties", ("aspect", "json", "stage"), "Production", "unknown field stage"),
    "nested unknown field": (
        "versionProperties",
        ("aspect", "json", "version", "color"),
        "red",
        "unknown field version.color",
    ),
    "missing field": ("versionProperties", ("aspect", "json"), {"sortId": "1"}, "does not parse|does not match"),
    "bad enum": ("dataProcessInstanceRunEvent", ("aspect", "json", "status"), "DONE", "does not parse|does not match"),
    "wrong type": ("mlModelProperties", ("aspect", "json", "groups"), "g", "does not parse|does not match"),
    "no urn": ("mlModelProperties", ("aspect", "json", "groups"), ["moe"], "is not a URN"),
    "urn of another entity": (
        "mlModelProperties",
        ("aspect", "json", "groups"),
        ["urn:li:corpuser:sam"],
        "is a corpuser, allowed are mlModelGroup",
    ),
    "edge to a person": (
        "dataProcessInstanceInput",
        ("aspect", "json", "inputEdges", 0, "destinationUrn"),
        "urn:li:corpuser:sam",
        "DataProcessInstanceConsumes.*is a corpuser",
    ),
    "entity type and urn differ": (
        "mlModelProperties",
        ("entityType",),
        "dataset",
        "is a mlModel, allowed are dataset",
    ),
    "unknown entity": ("mlModelProperties", ("entityType",), "mlmodel", "allowed are mlmodel"),
    "no upsert": ("mlModelProperties", ("changeType",), "DELETE", "changeType"),
    "unknown key": ("mlModelProperties", ("extra",), 1, "unknown key extra"),
    "aspect as text": ("mlModelProperties", ("aspect",), {"value": "{}"}, "aspect is not"),
}


@pytest.mark.parametrize(("aspect", "path", "value", "message"), PLANTED.values(), ids=PLANTED)
def test_the_check_catches_planted_errors(registered, aspect: str, path: tuple, value, message: str):
    """Every kind of error that DataHub's own file check misses, and those it finds, is found."""
    events = _events(registered).values()
    proposal = next(p for event in events for p in event.proposals if p["aspectName"] == aspect)
    assert check_proposal(proposal) == []
    problems = " | ".join(check_proposal(_plant(proposal, path, value)))
    assert re.search(message, problems), problems


def test_data_and_version_are_connected(registered):
    """From the dataset and the cut a path of lineage edges leads to the model version and to its promotion."""
    events = _events(registered)
    model = urns.model("mlflow", "moe", "3")
    fold, training, registry_run = urns.run("fold-3"), urns.run("core-1"), urns.run("run-3", orchestrator="mlflow")
    assert _edges(events["core_update"], training, "input") >= {urns.dataset("file", "clinic-a/notes")}
    assert _edges(events["core_update"], training, "output") == {urns.dataset("kafka", "updates.tier1")}
    assert _edges(events["aggregate_experts"], fold, "input") == {urns.dataset("kafka", CUT.name), urns.run("fold-2")}
    assert _edges(events["version"], registry_run, "input") == {fold}
    assert _edges(events["version"], registry_run, "output") == {model}
    assert _aspect(events["version"], model, "mlModelProperties")["trainingJobs"] == [registry_run, fold]
    promotion = urns.run(events["approve"].run_id)
    assert _edges(events["approve"], promotion, "input") == {fold, model}
    assert _edges(events["approve without registry"], promotion, "input") == {fold}


def test_no_event_takes_back_what_another_said(registered):
    """DataHub replaces whole aspects: what one event of a version's life says of an entity, no other contradicts."""
    events = _events(registered)
    training = _run("core_update", "fold-3", inputs=[DATASET], outputs=[CUT])  # the run that the version event names
    said: dict[tuple[str, str], str] = {}
    for event in (run_event(training), events["version"], events["reject"]):
        for proposal in event.proposals:
            if proposal["aspectName"] != "dataProcessInstanceRunEvent":  # a time series, every point is kept
                content = json.dumps(proposal["aspect"])
                assert said.setdefault((proposal["entityUrn"], proposal["aspectName"]), content) == content


def test_an_approval_moves_the_champion_alias_and_a_rejection_does_not(registered):
    """The alias leaves the previous champion and comes to the approved version."""
    events = _events(registered)
    old, new = urns.model("mlflow", "moe", "2"), urns.model("mlflow", "moe", "3")
    assert _aspect(events["approve"], old, "versionProperties")["aliases"] == []
    assert _aspect(events["approve"], new, "versionProperties")["aliases"] == [{"versionTag": "champion"}]
    assert all(p["aspectName"] != "versionProperties" for p in events["reject"].proposals)


def test_no_words_of_a_person_leave(registered):
    """The reason of a decision stays in the chain."""
    assert b"words of a person" not in json.dumps([event.proposals for event in _events(registered).values()]).encode()


def test_a_repeated_event_is_recorded_once_under_the_same_ids(tmp_path: Path, registered):
    """Recording again, with other times, as a re-run after a crash does, adds nothing."""
    outbox = LineageOutbox(tmp_path / "lineage.jsonl")
    first = outbox.record(run_event(_run()))
    size = (tmp_path / "lineage.jsonl").stat().st_size
    again = outbox.record(run_event(_run(started_ms=9_000, finished_ms=9_900)))
    assert first == again
    assert len(set(first)) == len(first)
    assert (tmp_path / "lineage.jsonl").stat().st_size == size
    assert set(outbox.record(run_event(_run(run_id="fold-4")))).isdisjoint(first)


def test_a_half_recorded_event_does_not_count_until_it_is_completed(tmp_path: Path, registered):
    """After a crash in the middle of an event the outbox says so, and the repetition adds the missing half."""
    path = tmp_path / "lineage.jsonl"
    outbox = LineageOutbox(path)
    ids = outbox.record(run_event(_run()))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:100])
    assert not outbox.has(run_id="fold-3")
    assert outbox.missing(ids) == ids[4:]
    outbox.record(run_event(_run()))
    assert outbox.has(run_id="fold-3")
    assert path.read_bytes() == whole


def test_has_tells_runs_and_versions_from_promotions(tmp_path: Path, registered):
    """A promotion's record says nothing about how a version came to be, so it does not count as its lineage."""
    outbox, events = LineageOutbox(tmp_path / "lineage.jsonl"), _events(registered)
    outbox.record(events["approve"])
    assert not outbox.has(manifest_digest=MANIFEST)
    outbox.record(events["aggregate_experts"])
    assert outbox.has(run_id="fold-3")
    assert not outbox.has(manifest_digest=MANIFEST)
    outbox.record(events["version"])
    assert outbox.has(manifest_digest=MANIFEST)
    assert not outbox.has(run_id="fold-2")
    assert outbox.missing(["0" * 64]) == ("0" * 64,)


def test_an_altered_outbox_is_named(tmp_path: Path):
    """A line without the fields of a record is an alteration, with file and line."""
    path = tmp_path / "lineage.jsonl"
    path.write_text('{"id":"1"}\n')
    with pytest.raises(GovernanceError, match=r"lineage\.jsonl line 1 lacks event, kind"):
        LineageOutbox(path).has(run_id="x")
    with pytest.raises(GovernanceError, match="has no proposals"):
        LineageOutbox(path).record(LineageEvent(kind="version", run_id="r", manifest_digest=None, proposals=()))


def test_governance_imports_neither_datahub_nor_mlflow():
    """Modules that every task imports do not pay for the catalogue's and the registry's client libraries."""
    code = (
        "import sys, tier1.governance.lineage, tier1.governance.lineage_outbox, tier1.governance.registry_mlflow, "
        "tier1.governance.promotion\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'datahub', 'mlflow', 'flytekit', 'torch'}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == "[]\n"

"""The five workflows on a tiny federation: each with `pyflyte run`, and their decisions in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flytekit.types.file import FlyteFile

from fednested_lib.errors import GovernanceError
from fednested_lib.signing import Signer
from images import specs
from services.gates import answer_gates
from tests.federation import Device, make_workspace
from tests.flyte.absent import lacking, run_without
from tier1.federation import Federation, open_federation
from tier1.governance.approvals import issue
from tier1.loops.evaluate_and_promote import waiting_versions
from tier1.loops.records import Outcome
from workflows.aggregate_experts import aggregate_experts
from workflows.aggregate_experts_sharded import aggregate_experts_sharded
from workflows.core_update import core_update
from workflows.data_engine_regions import data_engine_regions
from workflows.evaluate_and_promote import evaluate_and_promote
from workflows.nested_round import nested_round

ROOT = Path(__file__).resolve().parents[2]
DECK_LIMIT_BYTES = 100_000


def answers(*given: str) -> Callable[[], str]:
    """Give each answer once; a question too many fails the test."""
    rest = list(given)

    def provider() -> str:
        assert rest, "asked once too often"
        return rest.pop(0)

    return provider


@pytest.fixture
def config(tmp_path: Path) -> FlyteFile:
    """A federation whose version 1, a core update, is approved."""
    config = FlyteFile(str(make_workspace(tmp_path)))
    with answer_gates(answers("approve")):
        evaluate_and_promote(config=config, candidate=core_update(config=config).digest)
    return config


@pytest.fixture
def fed(config: FlyteFile) -> Federation:
    """The same federation: the in-memory log is one per process."""
    return open_federation(config.path)


def decide_in_round(config: FlyteFile, *given: str, **inputs: object) -> Outcome:
    with answer_gates(answers(*given)):
        return nested_round(config=config, **inputs).outcome


def test_a_round_folds_asks_once_and_publishes(config: FlyteFile, fed: Federation) -> None:
    """Device updates become a version, the person's approval makes it champion, and the champion is published."""
    for client in ("ann", "bob"):
        Device(fed, client).send()
    with answer_gates(answers("approve")):
        outcome, published = nested_round(config=config)
    assert (outcome.verdict, outcome.version, outcome.champion, published.version) == ("approved", 2, 2, 2)


def test_shards_make_the_candidate_of_the_one_task(config: FlyteFile, fed: Federation) -> None:
    """The mapped fold and the one of one task are one candidate; a cut without updates has no shards and no candidate.

    And a federation whose devices have told nothing is looked at region by region.
    """
    assert aggregate_experts_sharded(config=config, shards=3).digest == ""
    for client in ("ann", "bob"):
        Device(fed, client).send()
    sharded = aggregate_experts_sharded(config=config, shards=3)
    assert sharded.n_accepted == 2
    assert sharded == aggregate_experts(config=config)
    assert data_engine_regions(config=config).findings == []


def test_one_decision_covers_core_and_devices(config: FlyteFile, fed: Federation) -> None:
    """With core, the devices' updates fold into the settled core update: two versions, one question."""
    Device(fed, "ann").send()
    outcome = decide_in_round(config, "approve", core=True)
    assert (outcome.verdict, outcome.version, outcome.champion) == ("approved", 3, 3)


def test_a_core_update_without_device_updates_is_still_decided(config: FlyteFile) -> None:
    """When no device sent anything, the person is asked about the core update's version."""
    outcome = decide_in_round(config, "approve", core=True)
    assert (outcome.verdict, outcome.version) == ("approved", 2)


def test_a_rejection_is_a_result_and_spends_the_inputs(config: FlyteFile, fed: Federation) -> None:
    """A rejected round succeeds, the old champion stays published, and the next round asks nobody."""
    Device(fed, "ann").send()
    with answer_gates(answers("reject: sonnets got worse")):
        outcome, published = nested_round(config=config)
    assert (outcome.verdict, outcome.champion, published.version) == ("rejected", 1, 1)
    assert decide_in_round(config).verdict == "nothing"


def test_an_automatic_rejection_asks_nobody(tmp_path: Path) -> None:
    """What the automatic gate refused is recorded as such; there is nothing left for a person to decide."""
    strict = {"evaluation": {"max_regression": 0.0, "max_tries": 2}, "aggregation": {"max_norm": 1e6}}
    config = FlyteFile(str(make_workspace(tmp_path, **strict)))
    with answer_gates(answers("approve")):
        evaluate_and_promote(config=config, candidate=core_update(config=config).digest)
    Device(open_federation(config.path), "ann").send(size=3.0)
    outcome = decide_in_round(config)
    assert (outcome.verdict, outcome.champion) == ("gate_rejected", 1)


def test_a_signed_token_passes_through_the_gate(config: FlyteFile, fed: Federation) -> None:
    """The token is made when the question is asked, arrives unharmed, and is recorded as a verified identity."""
    approver = Signer.load(Path(config.path).parent / "keys" / "approver.key")

    def token() -> str:
        ((version, manifest),) = waiting_versions(fed)
        assert version == 2
        return issue(
            approver, verdict="approve", manifest_digest=manifest, approver="secops", issued_at=int(time.time())
        )

    Device(fed, "ann").send()
    with answer_gates(token):
        assert nested_round(config=config).outcome.verdict == "approved"
    decision = fed.chain.entries()[-1].entry.body
    assert (decision.channel, decision.approver, decision.verified) == ("token", "secops", True)


def test_a_flag_is_recorded_as_one(config: FlyteFile, fed: Federation) -> None:
    """An answer given by a command's flag is not passed off as one that a person typed at a console."""
    Device(fed, "ann").send()
    assert decide_in_round(config, "approve", channel="flag").verdict == "approved"
    decision = fed.chain.entries()[-1].entry.body
    assert (decision.channel, decision.verified) == ("flag", False)


def test_a_slip_of_the_pen_decides_nothing(config: FlyteFile, fed: Federation) -> None:
    """An answer that is no decision fails the run with one line; the version goes on waiting and can be asked again."""
    Device(fed, "ann").send()
    candidate = aggregate_experts(config=config).digest
    with answer_gates(answers("aprove")), pytest.raises(GovernanceError, match="neither approve, reject"):
        evaluate_and_promote(config=config, candidate=candidate)
    with answer_gates(answers("approve")):
        assert evaluate_and_promote(config=config).version == 2


def test_a_lost_settling_is_found_again(config: FlyteFile, fed: Federation) -> None:
    """A candidate whose round died before it was settled is settled by the next evaluation, without its digest."""
    Device(fed, "ann").send()
    assert aggregate_experts(config=config).n_accepted == 1
    with answer_gates(answers("approve")):
        assert evaluate_and_promote(config=config).champion == 2


def test_the_control_image_is_enough_for_its_tasks(config: FlyteFile) -> None:
    """What has the control image runs where nothing else can be imported."""
    program = f"""
import mlflow, datahub
from flytekit.types.file import FlyteFile
from tasks.control.decision import ask_secops
from tasks.data_engine import turn_engine
from tasks.failures import broadcast_failed
from tasks.promotion import report
from tasks.training import authorise
from tier1.federation import open_federation
from tier1.loops.records import Settled
entry = open_federation({config.path!r}).chain.entries()[1]
candidate = entry.entry.body.candidate.digest()
settled = Settled(status="rejected", version=1, manifest=entry.digest, candidate=candidate, tries=1, reason="")
authorise(config=FlyteFile({config.path!r}), run="control")
report(config=FlyteFile({config.path!r}), settled=settled)
ask_secops(settled=settled)
try:
    raise KeyError
except KeyError:
    broadcast_failed(config=FlyteFile({config.path!r}))
(home,) = open_federation({config.path!r}).home.glob("failures/*.announced")
turn_engine(config=FlyteFile({config.path!r}))
"""
    run_without(lacking(specs.control), program)


def pyflyte(config: Path, loop: str, *arguments: str, answer: str | None = None) -> str:
    """Run a workflow as a person does and return what it printed."""
    command = [sys.executable, "-m", "flytekit.clis.sdk_in_container.pyflyte", "run", f"workflows/{loop}.py", loop]
    scratch = config.parent / "tmp"
    scratch.mkdir(exist_ok=True)
    done = subprocess.run(
        [*command, "--config", str(config), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        input="" if answer is None else f"{answer}\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_each_workflow_runs_alone_with_pyflyte(tmp_path: Path) -> None:
    """The five commands of the README, each in a process of its own, with a person's answer on standard input."""
    config = make_workspace(tmp_path)
    assert "n_accepted=1" in pyflyte(config, "core_update", "--run", "first")
    assert "CandidateRef(digest=''," in pyflyte(config, "aggregate_experts")
    assert "verdict='approved', version=1, champion=1" in pyflyte(config, "evaluate_and_promote", answer="approve")
    assert "Published(version=1," in pyflyte(config, "broadcast")
    assert "verdict='rejected', version=2, champion=1" in pyflyte(config, "nested_round", "--core", answer="reject")

    decks = [path.read_text() for path in (tmp_path / "tmp").rglob("deck.html")]
    assert all(len(deck.encode()) <= DECK_LIMIT_BYTES for deck in decks)
    folded, gated = sorted((deck for deck in decks if "run first" in deck), key=lambda deck: "<td>plays</td>" in deck)
    assert "<td>plays</td>" not in folded
    assert "<td>plays</td>" in gated
    assert "<noscript><style>" in gated, "Flyte's page hides every deck until a script runs"

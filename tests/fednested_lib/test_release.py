"""The whole way out of one update: every rule on record, budgets charged once whatever dies, nothing smuggled."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from benchmarks.hostile_spool import CLASSES
from benchmarks.rows_sidecar import detected, honest, hostile_trials
from benchmarks.sidecar_scene import LAYERS, RULES, Scene, make_base, make_delta
from fednested_lib.audit import verify_audit
from fednested_lib.envelope import parse_envelope
from fednested_lib.errors import PayloadError, PolicyWait
from fednested_lib.events import TrainingTelemetry
from fednested_lib.privacy import epsilon
from fednested_lib.sidecar import norm
from tests.policies import make_policy

NOW = 1e9
DP = {"clip_norm": 1.0, "noise_multiplier": 2.0, "epsilon_total": 9.0, "delta": 1e-5}
PRIVATE = {**RULES, "adapters": [{"mode": "fixed_a", "rank": 4, "alpha": 8.0}], "dp": DP}


def _spool(scene: Scene, sequence: int, delta=None, tokens: int = 500) -> None:
    delta = delta or make_delta(scene.base, seed=sequence)
    counts = {layer: [tokens] * len(ids) for layer, ids in LAYERS.items()}
    scene.spool.write(
        delta,
        sequence=sequence,
        base_version=scene.base.version,
        base_digest=scene.base.digest,
        routed_tokens=counts,
        distinct_tokens=counts,
        num_examples=9,
    )


def _records(directory: Path) -> list[dict]:
    verify_audit(directory / "audit", anchor=directory / "anchor")
    return [json.loads(line) for line in (directory / "audit/log.jsonl").read_bytes().splitlines()]


def test_a_release_is_on_record_and_done_once(tmp_path):
    """Releasing twice leaves one outbox entry, one charge and one record, whose digest is that of the payload."""
    scene = Scene(tmp_path / "d", policy=make_policy(**{**RULES, "updates_per_day": 1}))
    _spool(scene, 0)
    first, again = scene.release(0), scene.release(0, now=NOW + 5)
    assert first == again
    ((envelope, payload),) = scene.sent()
    assert (envelope, len(payload)) == (first.to_bytes(), first.payload_bytes)
    (record,) = _records(tmp_path / "d")
    assert (record["decision"], record["sequence"], record["payload_sha256"]) == ("released", 0, first.payload_sha256)
    assert (record["experts"], record["withheld"], record["payload_bytes"]) == (8, 0, first.payload_bytes)
    assert record["norm"] == pytest.approx(norm(scene.arrived(first, payload)), rel=0.01)


@pytest.mark.parametrize(
    "point", ["sidecar.after_charge", "audit.after_line", "audit.after_key", "sidecar.after_audit", "outbox.after_file"]
)
def test_a_kill_anywhere_costs_nothing_twice(tmp_path, point):
    """Killed between any two steps and started again, the same bytes leave, one update is booked and recorded."""
    policy = make_policy(**{**RULES, "updates_per_day": 1})
    child = os.fork()
    if child == 0:
        os.environ["FEDNESTED_FAILPOINT"] = point
        scene = Scene(tmp_path / "d", policy=policy)
        _spool(scene, 0)
        scene.release(0)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    scene = Scene(tmp_path / "d", policy=policy)
    envelope = scene.release(0, now=NOW + 9)
    assert [item.update_id for item in scene.outbox.pending()] == [envelope.update_id]
    assert [record["decision"] for record in _records(tmp_path / "d")] == ["released"]
    _spool(scene, 1)
    with pytest.raises(PolicyWait) as caught:
        scene.release(1, now=NOW + 10)
    assert caught.value.not_before_s == NOW + 86_400
    other = Scene(tmp_path / "other", policy=policy)
    _spool(other, 0)
    assert other.release(0) == envelope


def test_what_waits_is_kept_and_leaves_later(tmp_path):
    """Over the budget of the day an update stays where it is, is recorded once as waiting, and leaves unchanged."""
    scene = Scene(tmp_path / "d", policy=make_policy(**{**RULES, "updates_per_day": 1}))
    _spool(scene, 0)
    _spool(scene, 1)
    scene.release(0)
    for late in (1, 2, 3):
        with pytest.raises(PolicyWait, match="updates_per_day = 1"):
            scene.release(1, now=NOW + late)
    assert scene.spool.has(1)
    scene.release(1, now=NOW + 86_400)
    assert [(r["decision"], r.get("rule")) for r in _records(tmp_path / "d")] == [
        ("released", None),
        ("waiting", "updates_per_day"),
        ("released", None),
    ]


@pytest.mark.parametrize(
    ("rule", "policy", "tokens"),
    [
        ("bytes_per_update", {"bytes_per_update": 100}, 500),
        ("too_few_tokens", {}, 15),
        ("too_few_tokens", {"min_tokens_per_rank": 200}, 500),
        ("too_few_tokens", {"min_tokens_per_width": 100}, 500),
        ("adapter_not_allowed", {"adapters": [{"mode": "lora", "rank": 8, "alpha": 16.0}]}, 500),
    ],
)
def test_what_is_refused_is_on_record_and_the_next_one_leaves(tmp_path, rule, policy, tokens):
    """A refusal names its rule in the audit log and jams nothing: once its cause is gone the next update leaves."""
    scene = Scene(tmp_path / "d", policy=make_policy(**{**RULES, **policy}))
    _spool(scene, 0, tokens=tokens)
    with pytest.raises(PayloadError) as caught:
        scene.release(0)
    assert caught.value.reason == rule
    assert (_records(tmp_path / "d")[-1]["rule"], scene.sent()) == (rule, [])
    scene.close()
    scene = Scene(tmp_path / "d", policy=make_policy(**RULES))
    _spool(scene, 1)
    scene.release(1)


def test_differential_privacy_spends_its_budget_and_says_no_count(tmp_path):
    """Noised updates leave with constant counts until ε is spent, and equal updates again as equal bytes."""
    scene = Scene(tmp_path / "d", policy=make_policy(**PRIVATE, telemetry="off"))
    base = make_base()
    left = 0
    while epsilon(2.0, left + 1, 1e-5) <= DP["epsilon_total"]:
        _spool(scene, left, make_delta(base, mode="fixed_a", seed=left), tokens=1 if left else 700)
        envelope = scene.release(left)
        assert envelope == scene.release(left)
        assert set(map(tuple, envelope.tokens.values())) == {(16,) * 4}
        assert envelope.num_examples == 1
        left += 1
    assert left > 0
    _spool(scene, left, make_delta(base, mode="fixed_a", seed=left))
    with pytest.raises(PolicyWait, match="would bring ε to") as caught:
        scene.release(left)
    assert (caught.value.reason, caught.value.not_before_s) == ("epsilon_total", None)
    released = [record for record in _records(tmp_path / "d") if record["decision"] == "released"]
    assert released[-1]["epsilon"] == pytest.approx(epsilon(2.0, left, 1e-5))
    arrived = scene.arrived(parse_envelope(scene.sent()[0][0]), scene.sent()[0][1])
    truth = make_delta(base, mode="fixed_a", seed=0)
    for name, each in truth.factors.items():
        assert np.abs(arrived.factors[name].lora_b - each.lora_b).max() > 0.5


def test_noised_telemetry_costs_a_release_more(tmp_path):
    """With noised telemetry each update is charged twice, and what is told is not what was measured."""
    plain = Scene(tmp_path / "a", policy=make_policy(**PRIVATE, telemetry="off"))
    both = Scene(tmp_path / "b", policy=make_policy(**PRIVATE, telemetry="noised"))
    spent = []
    for scene, directory in ((plain, "a"), (both, "b")):
        _spool(scene, 0, make_delta(scene.base, mode="fixed_a"))
        scene.release(0)
        spent.append(_records(tmp_path / directory)[-1]["epsilon"])
    assert spent == pytest.approx([epsilon(2.0, 1, 1e-5), epsilon(2.0, 2, 1e-5)])
    told = both.sidecar.telemetry(_event())
    assert told.loss_first != _event().loss_first
    assert (told.tokens, told.seconds, told.expert_tokens) == (1, 0.0, None)
    assert plain.sidecar.telemetry(_event()) is None


def test_telemetry_has_few_digits(tmp_path):
    """What is told of a training has no room for a message: rounded losses within bounds, bucketed tokens."""
    told = Scene(tmp_path / "d").sidecar.telemetry(_event(loss_first=3.141592653589793, loss_last=1e300))
    assert (told.loss_first, told.loss_last, told.tokens, told.seconds) == (3.142, 20.0, 512, 12.0)


def _event(**changes) -> TrainingTelemetry:
    numbers = {"loss_first": 3.0, "loss_last": 2.0, "tokens": 1000, "seconds": 12.345, "payload_bytes": 10}
    who = {"federation": "fednested", "client_id": "romeo", "sequence": 0, "base_version": 3}
    return TrainingTelemetry(**{**who, **numbers, **changes})


def test_every_hostile_class_is_refused_by_its_rule():
    """One file of each class of smuggling, lie, bomb and path trick: right rule, on record, nothing let out."""
    trials = hostile_trials(per_class=1, seed=3)
    assert [(t.name, t.found, t.recorded) for t in trials if not t.right] == []
    assert len(trials) == len(CLASSES) >= 70


def test_honest_updates_leave():
    """Updates of every mode, rank, set of experts and encoding arrive as they were trained, to a rounding step."""
    assert honest(100, seed=8, per_scene=10) == 100


def test_random_tamperings_are_found():
    """Whatever is done at random to a longer audit log is found."""
    assert detected(3, seed=2) == 100.0


def test_a_lying_trainer_cannot_write_in_low_bits(tmp_path):
    """What a mantissa's lowest bit says is a coin's toss after the sidecar, though the honest values are near."""
    scene, rng = Scene(tmp_path / "d"), np.random.default_rng(0)
    delta = make_delta(scene.base, size=0.05)
    bits = {}
    for name, each in delta.factors.items():
        words = each.lora_b.view(np.uint32)
        bits[name] = rng.integers(0, 2, words.shape, dtype=np.uint32)
        words[...] = (words & ~np.uint32(1)) | bits[name]
    _spool(scene, 0, delta)
    arrived = scene.arrived(scene.release(0), scene.sent()[0][1])
    read = [(arrived.factors[name].lora_b.view(np.uint32) & 1) == truth for name, truth in bits.items()]
    assert abs(np.concatenate([each.ravel() for each in read]).mean() - 0.5) < 0.08
    for name, each in delta.factors.items():
        assert np.allclose(arrived.factors[name].lora_b, each.lora_b, atol=np.abs(each.lora_b).max() / 100)


def test_canaries_are_found_where_they_are():
    """The search for canaries finds each in every coding it claims to see, so that finding none means something."""
    from benchmarks.byte_canaries import CANARIES, _check_search, found_in

    _check_search()
    assert found_in(random.Random(0).randbytes(200_000)) == set()
    assert found_in(b"a" * 100 + CANARIES["user"].encode("utf-16-le")) == {"user"}

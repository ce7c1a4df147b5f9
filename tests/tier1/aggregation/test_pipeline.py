from __future__ import annotations

import math
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import yaml

from fednested_lib.errors import ConfigError
from tests.federation import make_workspace
from tests.oracle import distances
from tests.tier1.versions.scene import SETTINGS, Scene, random_delta, shifted
from tier1.aggregation import registry
from tier1.aggregation.gram import Gram
from tier1.aggregation.registry import choose, origin
from tier1.aggregation.weights import discount, weigh
from tier1.config import load_tier1
from tier1.versions.replay import replay
from tier1.versions.settings import AggregationSettings, ReputationSettings

A, B = (0, 0), (0, 1)
FIRST_RELEASE = (
    b'{"max_norm":50.0,"max_staleness":16,"min_coverage":1,"min_mass_tokens":256,"rule":"weighted_mean",'
    b'"staleness_exponent":0.5,"token_cap":1048576}'
)


def gram_of(x: np.ndarray) -> Gram:
    return Gram(inner=x @ x.T, distance2=distances(x) ** 2)


def write_config(directory: Path, **aggregation) -> Path:
    path = make_workspace(directory)
    document = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**document, "aggregation": aggregation}))
    return path


def test_settings_of_the_first_release_keep_their_bytes():
    """A manifest written before there were more settings loads, means the same and has the same bytes and signature."""
    old = AggregationSettings.model_validate_json(FIRST_RELEASE)
    assert old == AggregationSettings()
    assert old.to_bytes() == FIRST_RELEASE


def test_settings_that_are_set_are_written():
    """Every setting that is not what the first release did is in the manifest, and comes back from it."""
    settings = AggregationSettings(rule="krum", rule_options={"f": 2}, staleness="hinge", reputation={"floor": 0.2})
    again = AggregationSettings.model_validate_json(settings.to_bytes())
    assert again == settings
    assert b'"rule_options":{"f":2}' in settings.to_bytes()


@pytest.mark.parametrize(
    ("aggregation", "said"),
    [
        ({"rule": "krumm"}, "aggregation.rule must be one of .*krum.*, got 'krumm': fix the name or install"),
        ({"rule": "krum", "rule_options": {"g": 1}}, r"rule_options.g is no option of rule krum \(its options: f\)"),
        (
            {"rule": "krum", "rule_options": {"f": -1}},
            r"rule_options.f of rule krum must be a whole number in 0..*got -1",
        ),
        ({"rule": "krum", "rule_options": {"f": 1.5}}, "must be a whole number .* got 1.5"),
        ({"rule": "krum", "rule_options": {"f": True}}, "must be a whole number .* got True"),
        (
            {"rule": "centred_clipping", "rule_options": {"radius": 0}},
            "radius of rule centred_clipping must be a number",
        ),
        ({"rule": "fltrust"}, "fltrust needs a root: set aggregation.root"),
        (
            {"rule": "trimmed_mean", "measure": True},
            "measure needs a Gram matrix, which rule trimmed_mean does not have",
        ),
        ({"token_cap": 0}, "aggregation.token_cap = 0"),
        ({"staleness": "linear"}, "aggregation.staleness = 'linear'"),
        ({"outer": {"kind": "adam", "beta": 1.0}}, r"aggregation.outer.beta = 1\.0"),
        ({"reputation": {"flor": 0.1}}, "unknown key aggregation.reputation.flor"),
    ],
)
def test_bad_pipeline_is_refused_at_load_time(tmp_path, aggregation, said):
    """What nobody registered and what is out of bounds is one line that names key, value and file."""
    path = write_config(tmp_path, **aggregation)
    with pytest.raises(ConfigError, match=said) as caught:
        load_tier1(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_pipeline_in_yaml(tmp_path):
    """A whole pipeline is read from YAML."""
    wanted = {
        "max_norm": 20.0, "max_expert_norm": 5.0, "staleness": "hinge", "hinge_delay": 2, "reputation": {"window": 8},
        "rule": "multi_krum", "rule_options": {"f": 1, "m": 3}, "scope": "shared", "outer": {"kind": "momentum"},
    }  # fmt: skip
    settings = load_tier1(write_config(tmp_path, **wanted)).aggregation
    assert settings.rule_options == {"f": 1, "m": 3}
    assert (settings.reputation.window, settings.outer.kind, settings.scope) == (8, "momentum", "shared")


def test_staleness_functions():
    """Polynomial (1 + τ)^(−½), hinge 1/(1 + slope·(τ − delay)), constant 1; all are 1 when fresh."""
    polynomial = AggregationSettings()
    hinge = AggregationSettings(staleness="hinge", hinge_delay=2, hinge_slope=0.5)
    constant = AggregationSettings(staleness="constant")
    assert [discount(tau, polynomial) for tau in (0, 3)] == [1.0, 0.5]
    assert [discount(tau, hinge) for tau in (0, 2, 4)] == [1.0, 1.0, 0.5]
    assert [discount(tau, constant) for tau in (0, 9)] == [1.0, 1.0]


def test_expert_clip_bounds_each_expert():
    """With max_expert_norm no device moves one expert by more than that, others keep their share."""
    x = np.array([[3.0, 4.0], [0.1, 0.0], [0.0, 0.1]])
    settings = AggregationSettings(max_expert_norm=1.0, max_norm=1e9, min_mass_tokens=1)
    rows = weigh("abc", [{A: 100}] * 3, [0] * 3, [1.0] * 3, settings, grams=lambda _e, _i: gram_of(x)).weights
    assert [row[A] for row in rows] == pytest.approx([1 / 5 / 3, 1 / 3, 1 / 3])


def test_step_bound_holds_over_all_experts():
    """With max_step_norm the aggregate over all experts is brought to the bound, directions unchanged."""
    rng = np.random.default_rng(0)
    x = {A: rng.normal(size=(3, 8)), B: rng.normal(size=(3, 8))}
    tokens = [{A: 100, B: 300}] * 3

    def run(**fields):
        settings = AggregationSettings(max_norm=1e9, min_mass_tokens=1, **fields)
        return weigh("abc", tokens, [0] * 3, [1.0] * 3, settings, grams=lambda e, _i: gram_of(x[e[0]])).weights

    def norm(rows):
        return math.sqrt(
            sum((np.array([row[e] for row in rows]) @ x[e]) @ (np.array([row[e] for row in rows]) @ x[e]) for e in x)
        )

    free, bound = run(measure=True), run(max_step_norm=0.1)
    assert norm(free) > 0.1
    assert norm(bound) == pytest.approx(0.1)
    assert bound[0][A] / bound[1][B] == pytest.approx(free[0][A] / free[1][B])


def test_shared_scope_judges_whole_updates():
    """An update that is an outlier in one expert only is left out of all when experts are judged together."""
    rng = np.random.default_rng(1)
    x = {A: rng.normal(size=(5, 8)), B: rng.normal(size=(5, 8))}
    x[A][4] *= 50
    tokens = [{A: 100, B: 100}] * 5

    def grams(experts, _indices):
        return gram_of(np.concatenate([x[e] for e in experts], axis=1))

    def run(scope):
        settings = AggregationSettings(
            rule="multi_krum", rule_options={"m": 4}, scope=scope, max_norm=1e9, min_mass_tokens=1
        )
        return weigh("abcde", tokens, [0] * 5, [1.0] * 5, settings, grams=grams).weights[4]

    assert run("shared") == {A: 0.0, B: 0.0}
    assert run("expert")[A] == 0.0


def test_cosine_and_distance_are_recorded(scene_with):
    """A measured fold records, per update, cosine and distance to the aggregate before mass over its experts."""
    scene = scene_with(measure=True)
    deltas = {client: random_delta(i) for i, client in enumerate(scene.clients)}
    for client, delta in deltas.items():
        scene.send(client, 0, delta)
    rows = scene.fold(scene.cut()).accepted
    vectors = {
        client: np.concatenate(
            [(d.spec.scale * f.lora_b.astype(float) @ f.lora_a.astype(float)).ravel() for f in d.factors.values()]
        )
        for client, d in deltas.items()
    }
    clipped = {row.client_id: row.clip * vectors[row.client_id] for row in rows}
    mean = sum(clipped.values()) / len(clipped)
    for row in rows:
        x = clipped[row.client_id]
        assert row.cosine == pytest.approx(x @ mean / np.linalg.norm(x) / np.linalg.norm(mean))
        assert row.distance == pytest.approx(np.linalg.norm(x - mean))


@pytest.fixture
def scene_with(tmp_path):
    """Make a federation with other settings."""

    def make(**fields) -> Scene:
        scene = Scene(tmp_path / "home", settings=AggregationSettings(**{**SETTINGS.model_dump(), **fields}))
        scene.genesis()
        return scene

    return make


def test_reputation_falls_with_bad_history_and_replays(scene_with):
    """A client that turned against the others counts less later; replay finds the same trust from manifests alone."""
    scene = scene_with(reputation={"pseudo_count": 1.0}, max_staleness=8)
    base = scene.chain.state().head
    common = random_delta(7)
    for sequence in range(3):
        for i, client in enumerate(scene.clients):
            sign = -1.0 if client == "dan" else 1.0
            scene.send(client, sequence, shifted(common, sign, seed=10 * sequence + i), base=base)
        scene.send("cat", 90 + sequence, payload=b"no payload at all", base=base)  # cat's own fault, signed
        scene.advance()
    rows = {row.client_id: row for row in scene.chain.entries()[-1].entry.body.candidate.accepted}
    assert rows["ada"].trust > 0.99
    assert rows["dan"].trust < 0.7
    assert rows["cat"].trust < rows["ada"].trust
    assert rows["dan"].cosine < 0
    assert rows["dan"].weight < rows["ada"].weight
    results = list(replay(scene.chain, archive=scene.archive, genesis=scene.blobs, target=scene.blobs))
    assert [result.verdict for result in results] == ["identical"] * 4


def test_nobody_can_spoil_the_name_of_another(scene_with):
    """Records that somebody else forged, repeated or filled with other bytes cost the named client nothing."""
    scene = scene_with(reputation={"pseudo_count": 1.0}, max_staleness=8)
    base = scene.chain.state().head
    for sequence in range(2):
        scene.send("ada", sequence, base=base)
        envelope, _ = scene.envelope("ada", sequence + 50, random_delta(3), base=base)
        scene.send_bytes("ada", envelope.to_bytes(), b"other bytes")
        scene.send_bytes("ada", envelope.to_bytes().replace(b'"num_examples":8', b'"num_examples":9'), b"")
        scene.send("ada", 0, base=base)
        scene.advance()
    candidate = scene.chain.entries()[-1].entry.body.candidate
    assert {record.reason for record in candidate.refused} >= {"duplicate", "bad_update_id"}
    (row,) = candidate.accepted
    assert row.trust == 1.0


def test_reputation_has_a_floor():
    """Whatever the history, trust stays in [floor, 1], and the bounds are checked."""
    with pytest.raises(ValueError, match="floor"):
        ReputationSettings(floor=0.0)


@pytest.fixture
def registered(monkeypatch):
    """Register the example rule as an installed package would."""
    entry = EntryPoint("median_distance", "examples.custom_rule.median_distance:RULE", registry.ENTRY_POINTS)
    bare = EntryPoint("first_only", "tests.tier1.aggregation.test_pipeline:first_only", registry.ENTRY_POINTS)
    broken = EntryPoint("broken", "examples.custom_rule.gone:RULE", registry.ENTRY_POINTS)
    found = {one.name: one for one in (entry, bare, broken)}
    monkeypatch.setattr(registry, "_registered", lambda: found)


def first_only(_gram: Gram, prior: np.ndarray) -> np.ndarray:
    return np.full(len(prior), 0.5)


def test_example_rule_is_configuration(tmp_path, scene_with, registered):
    """The documented example loads by its entry point, folds, is named in the manifest, and replays."""
    aggregation = {"rule": "median_distance", "rule_options": {"reach": 3.0}}
    assert load_tier1(write_config(tmp_path / "w", **aggregation)).aggregation.rule == "median_distance"
    scene = scene_with(**aggregation)
    for client in scene.clients:
        scene.send(client, 0)
    scene.advance()
    assert (
        "median_distance=examples.custom_rule.median_distance:RULE"
        in scene.chain.entries()[-1].entry.body.candidate.code_version
    )
    results = list(replay(scene.chain, archive=scene.archive, genesis=scene.blobs, target=scene.blobs))
    assert [result.verdict for result in results] == ["identical"] * 2


def test_example_rule_leaves_outliers_out(registered):
    """The example does what its docstring says."""
    x = np.random.default_rng(0).normal(size=(6, 9))
    x[5] *= 100
    weights = choose(AggregationSettings(rule="median_distance")).weigh(gram_of(x), np.ones(6))
    assert weights.tolist() == pytest.approx([0.2] * 5 + [0.0])


def test_what_a_rule_returns_is_checked(registered):
    """A rule of a user whose weights do not sum to 1 stops the fold and is named."""
    chosen = choose(AggregationSettings(rule="first_only"))
    with pytest.raises(ConfigError, match="aggregation.rule first_only returned .* for 3 updates: .* sum to 1"):
        chosen.weigh(gram_of(np.eye(3)), np.ones(3))


def test_rule_that_cannot_be_imported_is_named(registered):
    """An entry point into a module that is not there is one line."""
    with pytest.raises(ConfigError, match="aggregation.rule broken .* cannot be imported"):
        choose(AggregationSettings(rule="broken"))


def test_our_own_rules_have_no_origin():
    """Only rules from outside add to the code version."""
    assert origin("krum") == ""


def test_fltrust_with_tier_1s_own_delta(scene_with):
    """The newest dense delta of the chain is the root: who points with it counts, who points against it does not."""
    scene = scene_with(rule="fltrust", root="tier1", max_norm=1e6)
    dense = scene.dense("run-1", size=1.0)
    scene.settle(scene.fold(dense))
    key = next(key for key in dense.blobs if "experts" in key)
    name, expert = key.rsplit("/", 1)
    from fednested_lib.snapshot import SLICE_TENSOR, decode_blob

    direction = decode_blob(scene.archive.get(dense.blobs[key]))[SLICE_TENSOR].astype(float)
    u, s, vt = np.linalg.svd(direction)
    for client, sign in (("ada", 1.0), ("bob", -1.0)):
        delta = random_delta(0, experts=(int(expert),), rank=2)
        f = delta.factors[name]
        aligned = type(f)(
            expert_ids=f.expert_ids,
            lora_a=vt[None, :2].astype(np.float32),
            lora_b=(sign * u[None, :, :2] * s[:2]).astype(np.float32),
        )
        scene.send(client, 0, type(delta)(spec=delta.spec, factors={**delta.factors, name: aligned}))
    before, candidate = scene.chain.state().head, scene.fold(scene.cut())
    rows = {row.client_id: row.weight for row in candidate.accepted}
    assert rows["ada"] > 0
    moved = [decode_blob(scene.blobs.get(v.blobs[key]))[SLICE_TENSOR].astype(float) for v in (candidate, before)]
    step = moved[0] - moved[1]
    assert (step * direction).sum() > 0

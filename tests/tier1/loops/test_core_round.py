from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from structlog.testing import capture_logs

from fednested_lib.blobs import write_durable
from fednested_lib.errors import SnapshotError, StorageError, TrainingError
from fednested_lib.log import DENSE
from fednested_lib.signing import Signer
from fednested_lib.snapshot import decode_blob, encode_blob
from tests.federation import make_workspace
from tier1.federation import Federation, open_federation
from tier1.loops import core_update
from tier1.loops.core_round import POLL_S, gather_round, last_state, waiting_updates
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import settle_candidate
from tier1.loops.replay import audit_version, replay_versions
from tier1.training.checkpoint import digest_of
from tier1.versions.dense_update import make_dense
from tier1.versions.manifest import DenseUpdate

CLUSTERS = {"count": 2, "max_wait_s": 60.0}
STEPS = 3


def make_clusters(directory: Path, **core) -> list[Federation]:
    """Open one federation as two clusters do: one home and log, a key and an order of rows for each."""
    core = {"steps": STEPS, "clusters": CLUSTERS, "schedule_steps": 4 * STEPS, **core}
    path = make_workspace(directory, core=core, aggregation={"core_outer": {"kind": "nesterov", "beta": 0.6}})
    document = yaml.safe_load(path.read_text())
    keys = {"tier1": Signer.load(directory / "keys/tier1.key"), "second": Signer.from_seed(b"\x02" * 32)}
    keys["second"].save(directory / "keys/second.key")
    trusted = {key.public_key: name for name, key in keys.items()}
    for seed, name in enumerate(keys):
        document["identity"] = {**document["identity"], "key": f"keys/{name}.key", "trusted": trusted}
        document["core"]["seed"] = seed
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return [open_federation(directory / f"{name}.yaml") for name in keys]


def with_clusters(fed: Federation, **changes) -> Federation:
    """Return the same federation with other `core.clusters`."""
    core = fed.config.core
    core = core.model_copy(update={"clusters": core.clusters.model_copy(update=changes)})
    return Federation(config=fed.config.model_copy(update={"core": core}))


def published(fed: Federation, run: str):
    """Train and publish."""
    return train_delta(fed, pack_datasets(fed, authorise_training(fed, run)), run)


def settled(fed: Federation, ref):
    """Fold and settle."""
    return settle_candidate(fed, fold_dense(fed, ref))


def test_whoever_is_last_folds_the_round_and_the_other_finds_it_folded(tmp_path):
    """Two rounds of two clusters are two versions that name both runs, have both lineages and replay to the bit."""
    clusters = make_clusters(tmp_path)
    for number in range(2):
        refs = [published(fed, f"{name}-{number}") for name, fed in zip("ab", clusters, strict=True)]
        first = settled(clusters[1], refs[1])
        assert (first.status, first.version) == ("head", number + 1)
        assert settled(clusters[0], refs[0]).version == number + 1
    state = clusters[0].chain.state()
    assert state.head.version == 2
    candidate = clusters[0].chain.entries()[-1].entry.body.candidate
    assert {dense.run_id for dense in candidate.inputs.round} == {"a-1", "b-1"}
    assert len(set(candidate.lineage)) == len(candidate.lineage) > 1
    assert sum("dense" in line for line in audit_version(clusters[0], 2)) == 2
    verdicts = [line for line in replay_versions(clusters[0]) if line.startswith("version")]
    assert all("identical" in line for line in verdicts)
    assert len(verdicts) == 3


def test_nobody_waits_for_ever(tmp_path):
    """A dead cluster holds the others up for the window and no longer; what it sends later is in the next round."""
    early, late = make_clusters(tmp_path)
    ref = published(early, "early")
    seconds = [0.0]

    def sleep(duration: float) -> None:
        seconds[0] += duration

    (own,) = waiting_updates(early, early.chain.state())
    assert gather_round(early, own, clock=lambda: seconds[0], sleep=sleep) == [own]
    assert CLUSTERS["max_wait_s"] <= seconds[0] < CLUSTERS["max_wait_s"] + 2 * POLL_S
    assert settled(with_clusters(early, max_wait_s=0.0), ref).version == 1
    late_ref = train_delta(late, pack_datasets(late, authorise_training(late, "late")), "late", 0)
    next_ref = published(early, "next")
    assert settled(late, late_ref).version == settled(early, next_ref).version == 2
    updates = early.chain.entries()[-1].entry.body.candidate.inputs.round
    assert {(dense.run_id, dense.base_version) for dense in updates} == {("late", 0), ("next", 1)}
    assert waiting_updates(early, early.chain.state()) == []


def test_a_bad_record_stops_nobody(tmp_path):
    """Bytes that are no dense update are passed over; the round is folded without them."""
    first, second = make_clusters(tmp_path)
    published(first, "a")
    first.log.append(DENSE, key=b"?", value=b"{}", headers={})
    assert settled(second, published(second, "b")).version == 1
    assert len(first.chain.entries()[-1].entry.body.candidate.inputs.round) == 2


def test_a_cluster_keeps_optimiser_and_place_in_the_schedule(tmp_path):
    """The second run goes on at step 4 from moments of the first; a run that died begins where it had begun."""
    first, _ = make_clusters(tmp_path, clusters={"count": 1}, checkpoint_every=1)
    settled(first, published(first, "a"))
    assert last_state(first).progress.step == STEPS
    settled(first, published(first, "b"))
    after = last_state(first)
    assert after.progress.step == 2 * STEPS
    assert {float(t) for name, t in after.state.items() if name.startswith("optimizer.step.")} == {2.0 * STEPS}
    assert first.chain.entries()[-1].entry.body.candidate.inputs.dense.steps == STEPS


@pytest.mark.parametrize("where", ["keep_state", "write_durable"])
def test_a_run_whose_end_finds_a_full_disk_goes_on_in_its_schedule(tmp_path, monkeypatch, where):
    """Guards schedule and moments: however often the last writes fail, a retry ends as an undisturbed run does."""
    core = {"clusters": {"count": 1}, "checkpoint_every": 1}
    (calm, _), (fed, _) = (make_clusters(tmp_path / name, **core) for name in ("calm", "full"))
    for one in (calm, fed):
        settled(one, published(one, "a"))
    whole = trained(calm, published(calm, "b"))
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(core_update, where, full_disk)
            with pytest.raises(StorageError, match="disk full"):
                published(fed, "b")
    assert any((fed.home / "dense").glob("*.checkpoints/*"))
    assert trained(fed, published(fed, "b")) == whole
    assert not any((fed.home / "dense").glob("*.checkpoints")), "a published run needs none"
    kept, undisturbed = last_state(fed), last_state(calm)
    assert (kept.progress, kept.progress.step) == (undisturbed.progress, 2 * STEPS)
    assert digest_of(kept.state) == digest_of(undisturbed.state)


def trained(fed: Federation, ref):
    """Return slice → digest of what was trained."""
    return json.loads((fed.home / "dense" / f"{ref.update_id}.json").read_bytes())["dense"]["blobs"]


def full_disk(*arguments):
    """Write what a run begins with, and nothing of how it ended."""
    if str(arguments[0]).endswith(".base.json"):
        return write_durable(*arguments)
    raise StorageError("disk full")


def test_a_run_whose_beginning_is_not_kept_any_more_is_told_so(tmp_path, monkeypatch):
    """Guards a run that died long ago: others of its cluster went on, and it is not trained from their moments."""
    fed, _ = make_clusters(tmp_path, clusters={"count": 1}, checkpoint_every=1)
    settled(fed, published(fed, "a"))
    with monkeypatch.context() as patch:
        patch.setattr(core_update, "keep_state", full_disk)
        with pytest.raises(StorageError):
            published(fed, "b")
    for name in "cd":
        settled(fed, published(fed, name))
    with pytest.raises(TrainingError, match=rf"began at step {STEPS} of the schedule, whose state is not in"):
        published(fed, "b")


def test_half_precision_deltas_take_half_the_bytes(tmp_path):
    """A delta in fp16 differs by rounding alone and is half as large; F does not care."""
    sizes, heads = [], []
    for dtype in ("float32", "float16"):
        fed, _ = make_clusters(tmp_path / dtype, clusters={"count": 1}, delta_dtype=dtype)
        settled(fed, published(fed, "a"))
        dense = fed.chain.state().head.dense
        blobs = {key: fed.archive.get(digest) for key, digest in dense.blobs.items()}
        sizes.append(sum(array.nbytes for data in blobs.values() for array in decode_blob(data).values()))
        heads.append({key: decode_blob(fed.blobs.get(digest)) for key, digest in fed.chain.state().head.blobs.items()})
    assert sizes[0] == 2 * sizes[1]
    for key, tensors in heads[0].items():
        for name, array in tensors.items():
            np.testing.assert_allclose(heads[1][key][name], array, atol=2e-5)


def test_an_unusable_delta_is_no_reason_to_wait_no_longer(tmp_path):
    """A cluster whose delta is lost is waited for like one that sent none; it is said once, not at every look."""
    first, second = make_clusters(tmp_path)
    published(first, "a")
    (bad,) = waiting_updates(first, first.chain.state())
    Path(first.archive.location(next(iter(bad.blobs.values())))).unlink()
    published(second, "b")
    (own,) = (dense for dense in waiting_updates(second, second.chain.state()) if dense.run_id == "b")
    seconds = [0.0]

    def sleep(duration: float) -> None:
        seconds[0] += duration

    with capture_logs() as logs:
        assert gather_round(second, own, clock=lambda: seconds[0], sleep=sleep) == [own]
    assert seconds[0] >= CLUSTERS["max_wait_s"]
    assert [entry["run"] for entry in logs if entry["event"] == "core_round.unusable"] == ["a"]


@pytest.mark.parametrize("damage", ["lost", "shape", "huge", "endless half", "fisher", "part of a fisher"])
def test_an_unusable_delta_of_another_cluster_stops_nobody(tmp_path, damage):
    """What one cluster's delta lacks in the archive is said and left out; the others' round is folded without it."""
    first, second = make_clusters(tmp_path)
    ref = published(first, "a")
    (bad,) = waiting_updates(first, first.chain.state())
    key, digest = next(iter(bad.blobs.items()))
    if damage == "lost":
        Path(first.archive.location(digest)).unlink()
    else:
        arrays = {name: np.zeros(each.shape) for name, each in decode_blob(first.archive.get(digest)).items()}
        arrays = {
            "shape": {"weight": np.full(3, -1.0, np.float32)},
            "huge": {name: each + 1e300 for name, each in arrays.items()},
            "endless half": {name: (each + np.inf).astype(np.float16) for name, each in arrays.items()},
            "fisher": {name: each - 1 for name, each in arrays.items()},
            "part of a fisher": arrays,
        }[damage]
        wrong = first.archive.put(encode_blob(arrays))
        fields = bad.model_dump(include=set(DenseUpdate.model_fields) - {"update_id", "signer", "signature", "format"})
        fields |= {"fisher": {key: wrong}} if "fisher" in damage else {"blobs": {**bad.blobs, key: wrong}}
        first.log.append(DENSE, key=b"bad", value=make_dense(first.signer, **fields).to_bytes(), headers={})
    with capture_logs() as logs:
        assert settled(with_clusters(second, max_wait_s=0.0), published(second, "b")).version == 1
    used = {dense.run_id for dense in first.chain.entries()[-1].entry.body.candidate.inputs.round}
    assert "b" in used
    assert [entry["run"] for entry in logs if entry["event"] == "core_round.unusable"] == ["a"]
    assert ("a" in used) == (damage != "lost")
    if damage == "lost":
        with pytest.raises(SnapshotError, match=digest):
            settled(with_clusters(first, max_wait_s=0.0), ref)

"""The device loop: what it sends, when it stops, and that a kill anywhere changes no byte of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from fednested_lib.blobs import BlobStore
from fednested_lib.client import Client, run
from fednested_lib.config import Tier2Config
from fednested_lib.delta import decode
from fednested_lib.envelope import HEADER, Envelope, parse_envelope, verify_envelope
from fednested_lib.errors import DataError, SnapshotError, StorageError, TransportError
from fednested_lib.events import (
    FederationEnd,
    ModelAvailable,
    ResendUnsettled,
    UpdatesSettled,
    parse_event,
    sign_event,
)
from fednested_lib.log import CONTROL, TELEMETRY, TOPICS, UPDATES, InMemoryLog
from fednested_lib.outbox import Outbox
from fednested_lib.sidecar_loop import SidecarState
from fednested_lib.signing import Signer
from fednested_lib.snapshot import SnapshotManifest, describe_config, expert_shapes, slice_key, write_state_dict
from fednested_lib.state import load_state
from fednested_lib.telemetry import expert_tokens
from tests.policies import pin_policy

SERVER = Signer.from_seed(b"s" * 32)
DEVICE = Signer.from_seed(b"d" * 32)
CONTROL_KEYS = {"public_key": SERVER.public_key, "poll_s": 0.01}
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


class World:
    """Tier 1 as a device sees it: a blob store, a log, and signed events."""

    def __init__(self, directory: Path, make_model, tokenizer_json: bytes):
        self.directory = directory
        self.log = InMemoryLog(name="test")
        self.log.create_topics(TOPICS)
        self.blobs = BlobStore(directory / "tier1/blobs")
        self.model = make_model("mixtral", vocabulary=300)
        self.tokenizer = self.blobs.put(tokenizer_json)
        DEVICE.save(directory / "device.key")
        for name, word in (("text", "cat"), ("heldout", "mat")):
            lines = (json.dumps({"text": f"the {word} {i} sat on the mat and the cat {i * i}"}) for i in range(40))
            (directory / f"{name}.jsonl").write_text("\n".join(lines))

    def publish(self, version: int, federation: str = "fednested") -> SnapshotManifest:
        manifest = SnapshotManifest(
            version=version,
            family="mixtral",
            model_config=describe_config(self.model.config),
            tokenizer=self.tokenizer,
            blobs=write_state_dict(self.model.state_dict(), "mixtral", self.blobs),
        )
        self.announce(manifest, chain_seq=version, federation=federation)
        return manifest

    def publish_unfit(self, version: int, fault: str) -> SnapshotManifest:
        manifest = self.publish(version)
        if fault == "non_finite":
            broken = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
            broken["model.norm.weight"][0] = float("nan")
            changes = {"blobs": write_state_dict(broken, "mixtral", self.blobs)}
        elif fault == "other_architecture":
            changes = {"model_config": {**manifest.model_config, "hidden_act": "nobody knows"}}
        else:
            changes = {"tokenizer": self.blobs.put(b"{}")}
        manifest = replace(manifest, **changes)
        self.announce(manifest, chain_seq=version)
        return manifest

    def announce(
        self,
        manifest: SnapshotManifest,
        *,
        chain_seq: int,
        signer: Signer = SERVER,
        federation: str = "fednested",
    ) -> None:
        event = ModelAvailable(
            federation=federation,
            version=manifest.version,
            snapshot=self.blobs.put(manifest.to_json()),
            base_digest=manifest.digest,
            chain_seq=chain_seq,
            chain_head="0" * 64,
        )
        self.tell(event, signer)

    def tell(self, event, signer: Signer = SERVER) -> None:
        self.log.append(CONTROL, key=b"champion", value=event.to_bytes(), headers=sign_event(event, signer))

    def improve(self) -> None:
        with torch.no_grad():
            self.model.model.layers[0].mlp.experts.gate_up_proj[3] *= 1.01

    def config(self, home: str = "home", **sections) -> Tier2Config:
        training = {"steps": 3, "batch_size": 2, "seq_len": 16, "learning_rate": 1e-2, "max_updates": 1}
        document = {
            "client_id": "romeo",
            "key": self.directory / "device.key",
            "home": self.directory / home,
            "data": self.directory / "text.jsonl",
            "heldout": self.directory / "heldout.jsonl",
            "blobs_uri": str(self.directory / "tier1/blobs"),
            "payloads_uri": str(self.directory / "tier1/payloads"),
            "control": CONTROL_KEYS,
            "adapters": {"rank": 2, "alpha": 4.0},
            "training": {**training, **sections.pop("training", {})},
            "policy": pin_policy(self.directory, **{"min_tokens_per_rank": 1, **sections.pop("policy", {})}),
            **sections,
        }
        return Tier2Config.model_validate(document)

    def records(self, topic: str = UPDATES, log: InMemoryLog | None = None):
        log = log or self.log
        return list(log.read(topic, log.watermarks(topic)))

    def envelopes(self):
        return [parse_envelope(dict(record.headers)[HEADER]) for record in self.records()]

    def clone_log(self) -> InMemoryLog:
        """A fresh log with the same control events, as a second process sees the broker."""
        log = InMemoryLog(name="clone")
        log.create_topics(TOPICS)
        for record in self.records(CONTROL):
            log.append(CONTROL, key=record.key, value=record.value, headers=dict(record.headers))
        return log


@pytest.fixture
def world(tmp_path, make_model, tokenizer_json):
    return World(tmp_path, make_model, tokenizer_json)


def test_one_update_end_to_end(world):
    """A device fetches the model, trains, and sends one signed update that tier 1 can verify and decode."""
    manifest = world.publish(4)
    report = run(world.config(), log=world.log)
    assert (report.updates, report.waiting) == (1, 0)
    (record,) = world.records()
    envelope = parse_envelope(dict(record.headers)[HEADER])
    verify_envelope(envelope, DEVICE.public_key)
    assert record.key == b"romeo"
    assert (envelope.sequence, envelope.base_version, envelope.base_digest) == (0, 4, manifest.digest)
    payload = record.value or BlobStore(world.directory / "tier1/payloads").get(envelope.payload_sha256)
    delta = decode(
        payload,
        encoding=envelope.encoding,
        spec=envelope.adapter.spec(),
        expert_ids=envelope.layers(),
        shapes=expert_shapes(manifest),
    )
    assert any(factors.lora_b.any() for factors in delta.factors.values())
    (telemetry,) = world.records(TELEMETRY)
    event = parse_event(telemetry.value)
    told = {layer: ([int(each) for each in by], list(by.values())) for layer, by in event.expert_tokens.items()}
    assert told == {layer: (ids, envelope.tokens[layer]) for layer, ids in envelope.expert_ids.items()}
    assert b"cat" not in telemetry.value
    local = json.loads((world.directory / "home/trainer/reports/000000000000.json").read_bytes())
    assert local["heldout_after"] < local["heldout_before"]
    assert event.loss_last == pytest.approx(local["loss_last"], abs=2e-3)


def test_telemetry_leaves_out_what_it_has_no_room_for():
    """A record must not grow with the model: above 16,384 experts the counts stay in the envelope."""
    most = {"0": [0] * 10_000, "1": [0] * 6_384}
    ids = {layer: list(range(len(tokens))) for layer, tokens in most.items()}
    assert expert_tokens(Envelope.model_construct(expert_ids=ids, tokens=most)).keys() == {"0", "1"}
    more = {"0": [*ids["0"], 10_000], "1": ids["1"]}
    assert expert_tokens(Envelope.model_construct(expert_ids=more, tokens=more)) is None


def test_one_update_per_base_and_fresh_adapters(world):
    """A device waits for a new base after each update, goes on with its next rows, and repeats nothing it sent."""
    world.publish(0)
    config = world.config(training={"max_updates": 2})
    process = _fork(config, world.log)
    _eventually(lambda: [row[3] for row in _outbox(config)] == ["sent"])
    time.sleep(0.3)  # thirty looks at the control topic
    process.terminate()
    process.join(60)
    assert (config.home / "report.txt").read_text() == "stopped (1 updates made)"

    world.log = world.clone_log()
    world.improve()
    world.publish(1)
    run(config, log=world.log)
    rows = [tuple(row) for row in _outbox(config)]
    assert [(parse_envelope(row[1]).sequence, parse_envelope(row[1]).base_version) for row in rows] == [(0, 0), (1, 1)]
    state = json.loads((config.home / "trainer/state.json").read_bytes())
    assert state["next_row"] == 2 * 3 * 2


def test_updates_per_base(world):
    """With updates_per_base = 2 a device sends two updates on one base, from different rows and adapters."""
    world.publish(0)
    run(world.config(training={"updates_per_base": 2, "max_updates": 2}), log=world.log)
    first, second = world.envelopes()
    assert (first.sequence, second.sequence) == (0, 1)
    assert first.base_digest == second.base_digest
    assert first.payload_sha256 != second.payload_sha256


def test_unsigned_and_old_events_are_ignored(world):
    """A device acts on no event of another key and does not go back to an older announcement."""
    old = world.publish(0)
    world.improve()
    newer = world.publish(5)
    world.announce(old, chain_seq=0)
    world.announce(old, chain_seq=9, signer=DEVICE)
    world.tell(FederationEnd(federation="fednested", chain_seq=9, reason="cancelled"), signer=DEVICE)
    world.log.append(CONTROL, key=b"x", value=b"not an event", headers={})
    run(world.config(), log=world.log)
    assert [envelope.base_digest for envelope in world.envelopes()] == [newer.digest]


def test_announcement_must_match_its_snapshot(world):
    """A signed announcement of one version that points to the snapshot of another is refused with both numbers."""
    manifest = world.publish(0)
    event = ModelAvailable(
        federation="fednested",
        version=1,
        snapshot=world.blobs.put(manifest.to_json()),
        base_digest=manifest.digest,
        chain_seq=1,
        chain_head="0" * 64,
    )
    world.tell(event)
    with pytest.raises(SnapshotError, match="is version 0 .* announced were 1"):
        run(world.config(), log=world.log)


def test_stops_when_the_federation_ends(world):
    """An end after the model is obeyed at once; a model after an end starts the device again."""
    manifest = world.publish(0)
    world.tell(FederationEnd(federation="fednested", chain_seq=0))
    report = run(world.config(), log=world.log)
    assert (str(report), world.records()) == ("federation completed (0 updates made)", [])
    world.announce(manifest, chain_seq=1)
    assert run(world.config(), log=world.log).updates == 1


def test_an_update_over_the_budget_is_kept_and_leaves_at_the_next_start(world):
    """Over the policy's rate a device begins nothing new and keeps what it has, also when the federation ends."""
    world.publish(4)
    training = {"max_updates": 3, "updates_per_base": 3}
    config = world.config(training=training, policy={"min_interval_s": 3600.0})
    with Outbox(config.home / "outbox", max_bytes=1 << 24) as outbox:
        device = Client(config, world.log, outbox, lambda: False)
        while device.sidecar.orders.pause != "policy":
            assert device.sidecar.turn() is None
            device.trainer.turn()
        for _ in range(5):  # nothing new is begun meanwhile
            assert device.sidecar.turn() is None
            assert not device.trainer.turn()
        assert len(world.records()) == 1
        world.tell(FederationEnd(federation="fednested", chain_seq=4))
        device.sidecar.follow()
        assert device.sidecar.turn().reason == "federation completed"
        assert device.sidecar.spool.waiting() == [1]
    world.publish(5)
    policy = {"min_interval_s": 0.0, "version": 2}
    assert run(world.config(training=training, policy=policy), log=world.log).updates == 2
    assert [(each.sequence, each.base_version) for each in world.envelopes()] == [(0, 4), (1, 4), (2, 5)]


def test_an_old_end_sent_again_stops_nobody(world):
    """Whoever may append can repeat a signed end; a device that holds a newer model, or saw it announced, works on."""
    world.publish(0)
    end = FederationEnd(federation="fednested", chain_seq=0, reason="cancelled")
    world.tell(end)
    world.publish(1)
    world.tell(end)
    assert run(world.config(), log=world.log).updates == 1
    world.log = InMemoryLog(name="topic whose older events have expired")
    world.log.create_topics(TOPICS)
    world.tell(end)
    again = world.config(training={"updates_per_base": 2, "max_updates": 2})
    assert run(again, log=world.log).updates == 1


def test_another_federation_on_the_same_log_is_not_obeyed(world):
    """A model and an end of another federation, signed with the very key, change nothing for a device."""
    ours = world.publish(0)
    world.improve()
    world.publish(7, federation="other")
    world.tell(FederationEnd(federation="other", chain_seq=7))
    run(world.config(), log=world.log)
    (envelope,) = world.envelopes()
    assert (envelope.federation, envelope.base_digest) == ("fednested", ours.digest)


def test_lets_go_of_what_is_settled(world):
    """An update that tier 1 names leaves the outbox; one that only somebody else names, and other ids, do not."""
    world.publish(0)
    config = world.config(training={"updates_per_base": 2, "max_updates": 2})
    run(config, log=world.log)
    first, second = (envelope.update_id for envelope in world.envelopes())
    world.tell(UpdatesSettled(federation="fednested", chain_seq=1, update_ids=[first, "0" * 64]))
    world.tell(UpdatesSettled(federation="fednested", chain_seq=1, update_ids=[second]), signer=DEVICE)
    world.tell(UpdatesSettled(federation="other", chain_seq=1, update_ids=[second]))
    run(config, log=world.log)
    assert [row[3] for row in _outbox(config)] == ["confirmed", "sent"]
    assert [path.stem for path in (config.home / "outbox/payloads").iterdir()] == [second]


def test_sends_again_what_a_newer_model_does_not_name(world):
    """A sent update goes out once more, byte by byte, when a newer model came, it is unnamed and the time is over."""
    world.publish(0)
    config = world.config(training={"max_updates": 3}, control={**CONTROL_KEYS, "resend_after_s": 0.2})
    device = _beside(config, world.log)
    _eventually(lambda: len(world.records()) == 1)
    time.sleep(0.5)
    assert len(world.records()) == 1  # no newer model: nobody is waiting for it
    world.improve()
    world.publish(1)
    ids: list[str] = []

    def sent_again() -> bool:
        ids[:] = [envelope.update_id for envelope in world.envelopes()]
        return len(set(ids)) == 2 and ids.count(ids[0]) >= 2

    _eventually(sent_again)
    world.tell(UpdatesSettled(federation="fednested", chain_seq=1, update_ids=sorted(set(ids))))
    _eventually(lambda: [row[3] for row in _outbox(config)] == ["confirmed"] * 2)
    world.tell(FederationEnd(federation="fednested", chain_seq=1))
    device.join(60)
    assert not device.is_alive()


def test_fetches_only_what_changed_and_prunes(world):
    """After a fold the device downloads one expert and deletes the old one; it never prunes a shared store."""
    first = world.publish(0)
    run(world.config(), log=world.log)
    world.improve()
    second = world.publish(1)
    run(world.config(training={"max_updates": 2}), log=world.log)
    own = BlobStore(world.directory / "home/blobs")
    key = slice_key(GATE_UP, 3)
    assert own.has(second.blobs[key])
    assert not own.has(first.blobs[key])
    assert set(own.digests()) == {second.tokenizer, *second.blobs.values(), world.blobs.put(second.to_json())}
    assert world.blobs.has(first.blobs[key])
    shared = world.config("tier1", training={"max_updates": 1})  # its home/blobs is what it fetches from
    run(shared, log=world.log)
    assert world.blobs.has(first.blobs[key])


@pytest.mark.parametrize("fault", ["non_finite", "other_architecture", "bad_tokenizer"])
def test_goes_back_when_a_new_snapshot_does_not_load(world, fault):
    """A device whose newest model is unfit works on with the one before it, takes the bad one no second time, and the
    next one as usual."""
    first = world.publish(0)
    run(world.config(training={"max_updates": 1}), log=world.log)
    world.publish_unfit(1, fault)
    options = {"updates_per_base": 2}
    run(world.config(training={**options, "max_updates": 2}), log=world.log)
    assert [each.base_version for each in world.envelopes()] == [0, 0]
    state = load_state(world.directory / "home/sidecar/state.json", SidecarState)
    assert ([model.version for model in state.models], state.unloadable.version) == ([0], 1)
    own = {first.tokenizer, *first.blobs.values(), world.blobs.put(first.to_json())}
    assert set(BlobStore(world.directory / "home/blobs").digests()) == own
    Path(world.blobs.location(state.unloadable.snapshot)).unlink()
    device = Client(world.config(), world.log, Mock(last_sequence=lambda: 1, unconfirmed=list), lambda: False)
    device.follow()  # a restarted one asks for it no more: it is not even there
    world.improve()
    world.publish(2)
    run(world.config(training={**options, "max_updates": 3}), log=world.log)
    assert [each.base_version for each in world.envelopes()] == [0, 0, 2]
    state = load_state(world.directory / "home/sidecar/state.json", SidecarState)
    assert ([model.version for model in state.models], state.unloadable) == ([2], None)


def test_a_kill_on_the_way_back_to_the_old_snapshot_changes_nothing(world):
    """The way back is one rename too: killed behind it, the device goes on with the model that loads."""
    world.publish(0)
    run(world.config(), log=world.log)
    world.publish_unfit(1, "non_finite")
    config = world.config(training={"updates_per_base": 2, "max_updates": 2})
    process = _fork(config, world.log, "sidecar.after_roll_back")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    run(config, log=world.log)
    assert [each.base_version for each in world.envelopes()] == [0, 0]


def test_a_snapshot_broken_at_its_source_stops_no_device_that_has_another(world):
    """The older model goes on, and the new one is fetched when it is announced again, whole."""
    world.publish(0)
    run(world.config(), log=world.log)
    world.improve()
    manifest = world.publish(1)
    place = Path(world.blobs.location(manifest.blobs[slice_key(GATE_UP, 3)]))
    whole = place.read_bytes()
    place.write_bytes(b"rot")
    options = {"updates_per_base": 2}
    run(world.config(training={**options, "max_updates": 2}), log=world.log)
    place.write_bytes(whole)
    world.announce(manifest, chain_seq=1)
    run(world.config(training={**options, "max_updates": 3}), log=world.log)
    assert [each.base_version for each in world.envelopes()] == [0, 0, 1]


def test_heals_a_damaged_blob(world):
    """A blob that rotted on the device is fetched again; one that is broken at its source is named."""
    manifest = world.publish(0)
    run(world.config(), log=world.log)
    digest = manifest.blobs[slice_key(GATE_UP, 3)]
    Path(BlobStore(world.directory / "home/blobs").location(digest)).write_bytes(b"rot")
    config = world.config(training={"updates_per_base": 2, "max_updates": 2})
    assert run(config, log=world.log).updates == 1
    Path(world.blobs.location(digest)).write_bytes(b"rot")
    with pytest.raises(SnapshotError, match=f"{GATE_UP}/3.*{digest}"):
        run(world.config("other"), log=world.log)


def test_bad_input_is_one_named_error(world):
    """No text, an unreachable broker at the first start, a broken state file and a NaN each stop with their name."""
    world.publish(0)
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        run(world.config(data=world.directory / "nothing.jsonl"), log=world.log)
    with torch.no_grad():
        world.model.model.norm.weight[0] = float("nan")
    world.publish(1)
    with pytest.raises(SnapshotError, match=r"version 1 is not fit: loss over .* is nan"):
        run(world.config(heldout=None), log=world.log)
    assert world.records() == []
    for room in ("trainer", "sidecar"):
        (world.directory / f"broken-{room}" / room).mkdir(parents=True)
        (world.directory / f"broken-{room}" / room / "state.json").write_text("{}x")
        with pytest.raises(StorageError, match=rf"{room}/state\.json"):
            run(world.config(f"broken-{room}"), log=world.log)
    world.log.reachable = False
    with pytest.raises(TransportError):
        run(world.config("fresh"), log=world.log)


def test_offline_device_keeps_its_update(world, monkeypatch):
    """A log that goes away while a device trains loses nothing: the update waits and is sent at the next start."""
    world.publish(0)

    class Dying(InMemoryLog):
        def append(self, topic, **record):
            self.reachable = topic != UPDATES
            return super().append(topic, **record)

    dying = Dying(name="dying")
    dying.create_topics(TOPICS)
    for record in world.records(CONTROL):
        dying.append(CONTROL, key=record.key, value=record.value, headers=dict(record.headers))
    config = world.config()
    with monkeypatch.context() as patch:
        patch.setattr("fednested_lib.sidecar_loop.FAREWELL_S", 0.2)
        report = run(config, log=dying)
    assert (report.updates, report.waiting) == (1, 1)
    assert "1 not sent yet" in str(report)
    assert run(config, log=world.log).waiting == 0
    assert [envelope.sequence for envelope in world.envelopes()] == [0]


@pytest.mark.parametrize("lost", ["trainer", "sidecar", "outbox", "sidecar orders", "sidecar outbox orders"])
def test_a_lost_memory_uses_no_number_twice(world, lost):
    """Whatever one side forgets, and the sidecar even all it has, the device goes on after the last number it sent."""
    world.publish(0)
    run(world.config(), log=world.log)
    for room in lost.split():
        shutil.rmtree(world.directory / "home" / room)
    run(world.config(training={"max_updates": 2, "updates_per_base": 2}), log=world.log)
    assert [envelope.sequence for envelope in world.envelopes()] == [0, 1]


def _fork(config: Tier2Config, log: InMemoryLog, failpoint: str | None = None):
    def target():
        if failpoint:
            os.environ["FEDNESTED_FAILPOINT"] = failpoint
        report = run(config, log=log)
        (config.home / "report.txt").write_text(str(report))

    process = multiprocessing.get_context("fork").Process(target=target, daemon=True)  # ends with a test that fails
    process.start()
    return process


def _beside(config: Tier2Config, log: InMemoryLog) -> threading.Thread:
    """Run a device beside the test on the very same log, which a forked process would only see a copy of."""
    thread = threading.Thread(target=run, args=(config,), kwargs={"log": log}, daemon=True)
    thread.start()
    return thread


def _eventually(condition, patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _outbox(config: Tier2Config) -> list[tuple]:
    """Read the rows of a device's outbox from outside; none while it has no table yet."""
    try:
        with sqlite3.connect(f"file:{config.home}/outbox/outbox.db?mode=ro", uri=True) as database:
            rows = database.execute("SELECT sequence, envelope, payload_sha256, state FROM updates ORDER BY sequence")
            return rows.fetchall()
    except sqlite3.OperationalError:
        return []


FAILPOINTS = [
    "sidecar.after_fetch",
    "trainer.after_job",
    "trainer.after_training",
    "trainer.after_spool",
    "sidecar.after_release",
    "sidecar.after_send",
    "trainer.after_job:2",
    "trainer.after_spool:2",
    "outbox.after_file",
    "outbox.after_row",
    "outbox.after_append",
    "durable.before_rename:3",
]


@pytest.mark.slow
def test_a_kill_anywhere_changes_no_byte(world):
    """SIGKILL between any two durable steps: the restarted device has sent the very bytes of an undisturbed one."""
    world.publish(0)
    training = {"updates_per_base": 2, "max_updates": 2}
    calm = world.config("calm", training=training)
    run(calm, log=world.clone_log())
    expected = _outbox(calm)
    assert len(expected) == 2
    for failpoint in FAILPOINTS:
        config = world.config(failpoint.replace(":", "-"), training=training)
        process = _fork(config, world.clone_log(), failpoint)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, failpoint
        run(config, log=world.clone_log())
        assert _outbox(config) == expected, failpoint
        assert not list((config.home / "spool").glob("0*")), failpoint


def test_sends_again_what_is_not_settled_when_tier_1_asks(world):
    """Asked once, it sends the unsettled update once more, byte by byte, the settled one not; a repeat does nothing."""
    world.publish(0)
    config = world.config(training={"updates_per_base": 2, "max_updates": 2})
    run(config, log=world.log)
    first, second = world.envelopes()
    world.tell(UpdatesSettled(federation="fednested", chain_seq=1, update_ids=[first.update_id]))
    world.tell(ResendUnsettled(federation="other", chain_seq=1))
    world.tell(ResendUnsettled(federation="fednested", chain_seq=2), signer=DEVICE)
    run(config, log=world.log)
    assert len(world.records()) == 2
    world.tell(ResendUnsettled(federation="fednested", chain_seq=2))
    for _ in range(2):  # the second start reads the topic from its beginning
        run(config, log=world.log)
    assert [each.to_bytes() for each in world.envelopes()] == [each.to_bytes() for each in (first, second, second)]


@pytest.mark.parametrize(("name", "more"), [("test", 0), ("another cluster", 5)])
def test_a_control_topic_that_was_lost_is_read_from_its_beginning(world, name, more):
    """A running device misses nothing on a topic that came back shorter, or as another one that has grown since."""
    for version in range(3):
        world.publish(version)
    device = _beside(world.config(training={"max_updates": 9}), world.log)
    _eventually(lambda: len(world.records()) == 1)
    old, world.log = world.log, InMemoryLog(name=name)
    world.log.create_topics(TOPICS)
    world.tell(FederationEnd(federation="fednested", chain_seq=2))
    for _ in range(more):
        world.tell(FederationEnd(federation="other", chain_seq=2))
    with old._lock:
        old._records, old._low, old.name = world.log._records, world.log._low, name
    device.join(60)
    assert not device.is_alive()


@pytest.mark.parametrize("more", [0, 5])
def test_a_control_topic_that_regrew_between_two_looks_is_read_from_its_beginning(world, more):
    """One live device, the same topic cut to nothing and as long as before or longer at its next look: all is heard."""
    world.publish(0)
    config = world.config(training={"updates_per_base": 2, "max_updates": 9})
    with Outbox(config.home / "outbox", max_bytes=1 << 30) as outbox:
        device = Client(config, world.log, outbox, lambda: False)
        device.follow()
        for _ in range(2):
            device.start_job()
            device.finish_job()
        device.send()
        settled, late = outbox.unconfirmed()
        for _ in range(3):
            world.tell(FederationEnd(federation="other", chain_seq=0))
        device.follow()
        with world.log._lock:
            world.log._records[CONTROL][0].clear()
        world.improve()
        world.publish(2)
        world.tell(UpdatesSettled(federation="fednested", chain_seq=2, update_ids=[settled.update_id]))
        world.tell(ResendUnsettled(federation="fednested", chain_seq=1))
        world.tell(FederationEnd(federation="fednested", chain_seq=2))
        for _ in range(more):
            world.tell(FederationEnd(federation="other", chain_seq=2))
        device.follow()
        assert device.sidecar.model.version == 2
        assert [item.update_id for item in outbox.pending()] == [late.update_id]
        assert device.sidecar.ended is not None


def test_a_control_topic_cut_while_a_device_looks_is_read_at_the_next_look(world, monkeypatch):
    """Records that vanish between watermarks and reading are no end of the device, and what comes then is heard."""
    world.publish(0)
    config = world.config()
    with Outbox(config.home / "outbox", max_bytes=1 << 30) as outbox:
        device = Client(config, world.log, outbox, lambda: False)
        device.follow()
        seen = world.log.watermarks(CONTROL)
        world.log._records[CONTROL][0].clear()
        with monkeypatch.context() as patch:
            patch.setattr(world.log, "watermarks", Mock(side_effect=[seen, world.log.watermarks(CONTROL)]))
            device.sidecar.online(device.follow)
        world.tell(FederationEnd(federation="fednested", chain_seq=0))
        device.follow()
        assert device.sidecar.ended is not None


def test_a_control_topic_that_is_read_twice_changes_nothing(world):
    """Events heard again, all of them: no second resend, the same model, the same end; what came after an end too."""
    world.publish(0)
    config = world.config(training={"max_updates": 9})
    with Outbox(config.home / "outbox", max_bytes=1 << 30) as outbox:
        device = Client(config, world.log, outbox, lambda: False)
        device.follow()
        device.start_job()
        device.finish_job()
        device.send()
        world.tell(UpdatesSettled(federation="fednested", chain_seq=1, update_ids=["0" * 64]))
        world.tell(ResendUnsettled(federation="fednested", chain_seq=1))
        world.tell(FederationEnd(federation="fednested", chain_seq=1))
        world.publish(2)
        device.follow()
        device.send()
        held = device.sidecar.state, device.sidecar.ended, outbox.unconfirmed()
        assert device.sidecar.ended is None
        device.sidecar.topic._digest = "of another record"
        device.follow()
        assert (device.sidecar.state, device.sidecar.ended, outbox.unconfirmed()) == held
        world.tell(FederationEnd(federation="fednested", chain_seq=2))
        for digest in (device.sidecar.topic._digest, "of another record"):
            device.sidecar.topic._digest = digest
            device.follow()
            assert device.sidecar.ended is not None


def test_what_is_in_the_outbox_is_never_made_again(world):
    """A device whose text changed while it was dead still sends the update it had made, and no second one."""
    world.publish(0)
    config = world.config()
    process = _fork(config, world.clone_log(), "sidecar.after_release")
    process.join(60)
    made = [row[:3] for row in _outbox(config)]
    (world.directory / "text.jsonl").write_text(json.dumps({"text": "quite another text about a dog " * 20}))
    run(config, log=world.log)
    assert [row[:3] for row in _outbox(config)] == made
    assert [envelope.to_bytes() for envelope in world.envelopes()] == [made[0][1]]


def test_sigterm_ends_cleanly(world):
    """SIGTERM ends a pace of an hour or a wait at once, and the job is finished at the next start."""
    world.publish(0)
    config = world.config(training={"pace_s": 3600.0})
    process = _fork(config, world.clone_log())
    _eventually(lambda: list((config.home / "spool").glob("0*.json")))
    process.terminate()
    process.join(60)
    assert process.exitcode == 0
    assert (config.home / "report.txt").read_text().startswith("stopped")
    assert run(world.config(), log=world.log).updates == 1
    assert [envelope.sequence for envelope in world.envelopes()] == [0]

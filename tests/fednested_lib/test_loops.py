"""Sidecar and trainer as two sides of a few files: what each does with what the other wrote, or lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
from structlog.testing import capture_logs

from fednested_lib import trainer_loop
from fednested_lib.client import Client
from fednested_lib.errors import PayloadError, StorageError
from fednested_lib.events import FederationEnd
from fednested_lib.local_update import job_seed
from fednested_lib.orders import Orders, Refusal, Status, orders_path, read_note, status_path, write_note
from fednested_lib.outbox import Outbox
from fednested_lib.sidecar_loop import MAX_GAP
from fednested_lib.signing import canonical_json
from fednested_lib.snapshot import slice_key
from tests.fednested_lib.test_client import GATE_UP, World


@pytest.fixture
def world(tmp_path, make_model, tokenizer_json):
    made = World(tmp_path, make_model, tokenizer_json)
    made.publish(0)
    return made


@pytest.fixture
def device(world):
    """A device with a model, whose two sides are moved by hand."""
    config = world.config(training={"updates_per_base": 9, "max_updates": 9})
    with Outbox(config.home / "outbox", max_bytes=1 << 30) as outbox:
        made = Client(config, world.log, outbox, lambda: False)
        made.follow()
        yield made


def _spooled(device: Client) -> Path:
    """Let the trainer make its next update, and return the declaration."""
    for _ in range(9):
        if device.trainer.spool.waiting():
            break
        assert device.trainer.turn()
    (path,) = (device.config.home / "spool").glob("0*.json")
    return path


def _orders(device: Client) -> Orders:
    return read_note(orders_path(device.config.home), Orders)


def test_an_update_stays_in_the_spool_until_its_number_is_taken(device):
    """The trainer removes what it spooled when orders say so, and not before; then it begins the next one."""
    path = _spooled(device)
    assert not device.trainer.turn()
    assert path.exists()
    device.sidecar.hear_trainer()
    assert path.exists()  # what the trainer owns the sidecar does not touch
    assert _orders(device).next_sequence == 1
    assert device.trainer.turn()
    assert not path.exists()
    assert _spooled(device).name == "000000000001.json"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("text", "bad_declaration"),
        ("factors", "wrong_digest"),
        ("link", "spool_file"),
        ("pipe", "spool_file"),
        ("directory", "spool_file"),
        ("huge", "spool_file"),
    ],
)
def test_a_broken_spool_file_is_refused_by_name_and_made_again(device, broken, reason):
    """Garbage in the spool, however it got there, leaves nothing jammed: refused, made again, sent once."""
    path = _spooled(device)
    whole = path.read_bytes()
    if broken == "factors":
        path.with_suffix(".factors").write_bytes(b"x")
    else:
        path.unlink()
        made = {
            "text": lambda: path.write_text("{}"),
            "link": lambda: path.symlink_to(device.config.key),
            "pipe": lambda: os.mkfifo(path),
            "directory": path.mkdir,
            "huge": lambda: path.write_bytes(b" " * (9 << 20)),
        }
        made[broken]()
    with capture_logs() as logs:
        device.sidecar.hear_trainer()
    assert [each["reason"] for each in logs if each["event"] == "sidecar.refused"] == [reason]
    refused = _orders(device).refused
    assert (refused.sequence, refused.reason) == (0, reason)
    assert device.outbox.pending() == []
    assert device.trainer.turn()
    again = _spooled(device)
    assert {**json.loads(again.read_bytes()), "numbers": None} == {**json.loads(whole), "numbers": None}
    device.trainer.turn()
    device.sidecar.hear_trainer()
    (item,) = device.outbox.pending()
    assert item.sequence == 0


def test_rows_that_are_refused_twice_are_left_and_eight_refusals_end_the_trainer(device, monkeypatch):
    """An update that can never leave is made twice, then the next rows are tried; after eight it stops and says why."""

    def refuse(*_arguments):
        raise PayloadError("non_finite", "no")

    monkeypatch.setattr(device.sidecar.intake, "take", refuse)
    rows = []

    def go_on() -> None:
        for _ in range(20):
            _spooled(device)
            rows.append(device.trainer.state.job.first_row)
            device.trainer.turn()
            device.sidecar.hear_trainer()
            device.trainer.turn()

    with pytest.raises(PayloadError, match="8 updates in a row.*non_finite"):
        go_on()
    assert rows == [0, 0, 6, 6, 12, 12, 18, 18]
    assert device.outbox.last_sequence() is None


def test_an_update_of_a_version_that_is_not_held_is_refused(device):
    """A declaration that names a base of its own gets no further than its name."""
    path = _spooled(device)
    path.write_bytes(canonical_json({**json.loads(path.read_text()), "base_version": 7}))
    device.sidecar.hear_trainer()
    assert _orders(device).refused.reason == "wrong_base"


def test_a_damaged_manifest_is_fetched_anew_and_its_update_leaves(device):
    """The sidecar reads the manifest of an update's base; one that rotted on the disk must not jam the way out."""
    _spooled(device)
    Path(device.sidecar.blobs.location(device.sidecar.model.snapshot)).write_bytes(b"{}")
    device.sidecar.hear_trainer()
    device.sidecar.hear_trainer()
    (item,) = device.outbox.pending()
    assert item.sequence == 0


def test_a_trainer_cannot_use_the_numbers_up(device):
    """A number far beyond the next is not even looked at; one within the gap is taken, for a sidecar may forget."""
    path = _spooled(device)
    text = json.loads(path.read_text())
    for number, taken in ((MAX_GAP + 1, False), (7, True)):
        for suffix, data in ((".json", canonical_json({**text, "sequence": number})), (".factors", None)):
            other = path.with_name(f"{number:012d}{suffix}")
            other.write_bytes(path.with_suffix(".factors").read_bytes() if data is None else data)
        path.unlink(missing_ok=True)
        device.sidecar.hear_trainer()
        assert (device.outbox.last_sequence() == number) is taken
        path = other
    assert _orders(device).next_sequence == 8


def test_a_start_clears_the_spool_of_whatever_has_its_names(device):
    """A directory under a spool file's name, with something in it, is removed like a file: it stops no trainer."""
    for name in ("000000000007.json", "000000000007.factors"):
        (device.config.home / "spool" / name / "deep").mkdir(parents=True)
    device.trainer.spool.keep_only(None)
    assert device.trainer.spool.waiting() == []
    assert list((device.config.home / "spool").glob("*.factors")) == []


def test_a_lost_state_of_the_trainer_leaves_no_stale_update(world, device):
    """What lies in the spool without a job is not offered a second time under the next rows' name."""
    path = _spooled(device)
    (device.config.home / "trainer/state.json").unlink()
    trainer_loop.TrainerLoop(device.config, lambda: False)
    assert not path.exists()


def test_a_job_whose_snapshot_is_gone_is_begun_anew(world, device):
    """A sidecar that lost its state does not know the old base; the trainer takes the new one, with the same number."""
    device.trainer.look()
    device.trainer.begin()
    old = device.trainer.state.job
    world.improve()
    world.publish(1)
    (device.config.home / "sidecar/state.json").unlink()
    device.outbox.close()
    with Outbox(device.config.home / "outbox", max_bytes=1 << 30) as outbox:
        again = Client(device.config, world.log, outbox, lambda: False)
        again.follow()
        assert again.trainer.turn()
        assert again.trainer.state.job is None
        assert again.trainer.turn()
        job = again.trainer.state.job
        assert (job.sequence, job.first_row, job.model.version) == (old.sequence, old.first_row, 1)


def test_the_snapshot_of_a_job_is_kept_until_the_trainer_is_done(world, device):
    """A newer model comes while an update is made: the old blobs stay for it, and go when the new model has loaded."""
    _spooled(device)
    old = device.trainer.state.job.model.snapshot
    first = json.loads(world.blobs.get(old))["blobs"][slice_key(GATE_UP, 3)]
    world.improve()
    world.publish(1)
    device.follow()
    device.trainer.turn()
    device.sidecar._let_go(device.sidecar._status())
    assert device.sidecar.blobs.has(first)
    assert _orders(device).kept[0] == old
    for _ in range(9):
        device.sidecar.hear_trainer()
        device.trainer.turn()
    assert not device.sidecar.blobs.has(first)
    assert len(_orders(device).kept) == 1


def test_a_full_outbox_pauses_the_trainer_until_there_is_room(world):
    """Without room the update waits in the spool, the trainer begins no other, and a receipt lets both go on."""
    config = world.config(training={"updates_per_base": 9, "max_updates": 9})
    with Outbox(config.home / "outbox", max_bytes=12_000) as outbox:
        device = Client(config, world.log, outbox, lambda: False)
        device.follow()
        for _ in range(2):
            _spooled(device)
            device.sidecar.hear_trainer()
            device.trainer.turn()
        assert _orders(device).pause == "backlog"
        assert not device.trainer.turn()
        (held,) = outbox.pending()
        outbox.mark_sent(held.update_id, 0, 0)
        outbox.confirm([held.update_id])
        device.sidecar._due = None
        device.sidecar.hear_trainer()
        assert (_orders(device).pause, outbox.last_sequence()) == (None, 1)


def test_a_trainer_that_may_not_train_says_why_and_goes_on_later(world):
    """One function is asked before every update; while it has a reason, nothing is trained."""
    reasons = ["on_battery", "on_battery", None, None]
    config = world.config()
    with Outbox(config.home / "outbox", max_bytes=1 << 30) as outbox:
        client = Client(config, world.log, outbox, lambda: False)
        client.trainer.gatekeeper = Mock(forbids=lambda: reasons.pop(0) if reasons else None)
        client.follow()
        assert not client.trainer.turn()
        assert not client.trainer.turn()
        assert client.trainer.turn()
        assert client.trainer.state.job is not None


def test_old_orders_are_withdrawn_and_an_end_waits_for_the_job(world, device):
    """A sidecar starts with no orders but keeps the number; `completed` lets a begun update be finished."""
    device.trainer.look()
    device.trainer.begin()
    world.tell(FederationEnd(federation="fednested", chain_seq=0))
    device.sidecar._next_look = 0.0
    assert device.sidecar.turn() is None
    for _ in range(20):
        device.trainer.turn()
        if report := device.sidecar.turn():
            break
    assert (report.reason, report.updates) == ("federation completed", 1)
    device.outbox.close()
    with Outbox(device.config.home / "outbox", max_bytes=1 << 30) as outbox:
        again = Client(device.config, world.log, outbox, lambda: False)
        assert not orders_path(device.config.home).exists()
        assert again.trainer.turn() is False
        assert again.sidecar.orders.next_sequence == 1


def test_notes_are_parsed_strictly(tmp_path):
    """Each side takes the other's file for foreign bytes: unknown fields, free text and links are not read."""
    path = orders_path(tmp_path)
    write_note(path, Orders(refused=Refusal(id="0" * 32, sequence=1, reason="bad_spool")))
    text = json.loads(path.read_text())
    for change in ({"extra": 1}, {"next_sequence": "1"}, {"end": "soon"}, {"kept": ["x"]}):
        path.write_text(json.dumps({**text, **change}))
        with pytest.raises(StorageError, match=r"orders\.json is unusable"):
            read_note(path, Orders)
    note = status_path(tmp_path)
    note.parent.mkdir()
    note.symlink_to(path)
    with pytest.raises(StorageError, match=r"status\.json is unusable"):
        read_note(note, Status)


def test_starts_come_from_the_devices_key_and_stay_here(device):
    """Who lacks the key cannot compute an update's A0: the seed follows from the sidecar's secret, fresh per number."""
    secret, seeds = device.sidecar.signer.secret("start").hex(), []
    assert _orders(device).start_secret == secret
    for number in (0, 1):
        _spooled(device)
        seeds.append(device.trainer.state.job.seed)
        assert seeds[-1] == job_seed(device.config, secret, number)
        device.sidecar.hear_trainer()
        device.trainer.turn()
    assert len(set(seeds)) == 2
    sent = b"".join(path.read_bytes() for path in (device.config.home / "outbox").rglob("*") if path.is_file())
    assert len(sent) > 1000
    for private in (secret, *seeds):
        assert private.encode() not in sent
        assert bytes.fromhex(private) not in sent

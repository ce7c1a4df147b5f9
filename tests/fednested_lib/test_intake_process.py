"""The intake in a process of its own: equal to the one here, safe when it dies, and small at rest."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest

from fednested_lib import errors, failpoints
from fednested_lib.client import Client
from fednested_lib.errors import PayloadError, PolicyWait, ProcessEnded, SnapshotError, TransportError, error_of
from fednested_lib.intake import Intake
from fednested_lib.intake_process import IntakeProcess
from fednested_lib.outbox import Outbox
from tests.fednested_lib.test_client import World

AT_REST = """
import sys
from fednested_lib import cli
cli._configure_logging()
import fednested_lib.intake_process, fednested_lib.processes, fednested_lib.sidecar_loop, fednested_lib.kafka_log
import fednested_lib.outbox, fednested_lib.transport, confluent_kafka.admin
found = {"numpy", "torch", "rich", "asyncio.events"} & set(sys.modules)
assert not found, found
import asyncio
assert asyncio.run(asyncio.sleep(0, "awake")) == "awake"
"""


@pytest.fixture
def spooled(tmp_path, make_model, tokenizer_json):
    """A device whose trainer has spooled update 0, and its outbox."""
    world = World(tmp_path, make_model, tokenizer_json)
    world.publish(0)
    config = world.config(training={"updates_per_base": 9, "max_updates": 9})
    with Outbox(config.home / "outbox", max_bytes=1 << 30) as outbox:
        device = Client(config, world.log, outbox, lambda: False)
        device.follow()
        while not device.trainer.spool.waiting():
            assert device.trainer.turn()
        yield device, outbox


def test_the_update_is_the_one_that_the_intake_here_makes(spooled):
    """What a process of its own makes and tells is what this one does, to the byte, and making it again is nothing."""
    device, outbox = spooled
    apart = IntakeProcess(device.config, outbox)
    told = apart.take(0, device.sidecar.state.models)
    (item,) = outbox.pending()
    assert apart.take(0, device.sidecar.state.models) == told is not None
    assert Intake.open(device.config, outbox).take(0, device.sidecar.state.models) == told
    assert outbox.pending() == [item]


def test_a_refusal_comes_back_as_what_it_is(spooled):
    """An update that cannot leave is refused here with the rule that refused it there, and the outbox stays empty."""
    device, outbox = spooled
    (factors,) = device.trainer.spool.directory.glob("*.factors")
    factors.write_bytes(b"something else")
    with pytest.raises(PayloadError) as refused:
        IntakeProcess(device.config, outbox).take(0, device.sidecar.state.models)
    assert refused.value.reason == "wrong_digest"
    assert outbox.pending() == []


@pytest.mark.parametrize("point", ["sidecar.after_charge", "sidecar.after_audit"])
def test_a_process_that_is_killed_loses_nothing(spooled, monkeypatch, point):
    """SIGKILL ends the sidecar with the signal's name; started again, it makes the same update."""
    device, outbox = spooled
    monkeypatch.setattr(failpoints, "_hits", failpoints._hits.__class__())
    monkeypatch.setenv("FEDNESTED_FAILPOINT", point)
    apart = IntakeProcess(device.config, outbox)
    with pytest.raises(ProcessEnded, match="killed by SIGKILL; the update is still spooled") as ended:
        apart.take(0, device.sidecar.state.models)
    assert (ended.value.exit_code, outbox.pending()) == (137, [])
    monkeypatch.delenv("FEDNESTED_FAILPOINT")
    IntakeProcess(device.config, outbox).take(0, device.sidecar.state.models)
    (item,) = outbox.pending()
    Intake.open(device.config, outbox).take(0, device.sidecar.state.models)
    assert outbox.pending() == [item]


def test_a_machine_that_starts_no_process_is_one_line(spooled, monkeypatch):
    """No room for another process ends the sidecar with a sentence, not with the kernel's bare error."""
    device, outbox = spooled
    apart = IntakeProcess(device.config, outbox)
    monkeypatch.setattr(os, "fork", Mock(side_effect=OSError(errno.EAGAIN, "no room")))
    with pytest.raises(ProcessEnded, match=r"cannot be started \(no room\); the update is still spooled"):
        apart.take(0, device.sidecar.state.models)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_does_not_cut_an_update_short(spooled, monkeypatch, number):
    """What systemd or Ctrl-C sends to both processes leaves the child to finish the update that it makes."""
    device, outbox = spooled
    apart = IntakeProcess(device.config, outbox)
    make = Intake.take

    def take(intake, sequence, models):
        os.kill(os.getpid(), number)
        return make(intake, sequence, models)

    monkeypatch.setattr(Intake, "take", take)
    apart.take(0, device.sidecar.state.models)
    assert [item.sequence for item in outbox.pending()] == [0]


@pytest.mark.parametrize(
    "error",
    [
        PayloadError("bad", "x: 1, bound 0: mend it"),
        PolicyWait("rate", "later", not_before_s=3.5),
        SnapshotError("missing_blob", "gone"),
        TransportError("away", retry_after_s=2.0),
        ProcessEnded("dead", 137),
        errors.OutboxFull("full"),
    ],
)
def test_an_error_travels_whole(error):
    """Type, sentence, reason and numbers of an error survive the way between two processes."""
    again = error_of(error.to_document())
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_sidecar_at_rest_is_small():
    """The process that waits for updates has loaded neither numpy nor rich nor asyncio, which works all the same."""
    done = subprocess.run([sys.executable, "-c", AT_REST], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr

"""The audit log: whatever is done to it is found, and a crash is not taken for it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from fednested_lib.audit import AuditLog, Decision, verify_audit
from fednested_lib.errors import AuditError, StorageError
from tests.audit_tampering import EDITS, places, tampered, write_log


def _verify(home: Path, **options):
    return verify_audit(home / "audit", anchor=home / "anchor", **options)


def test_a_log_holds_and_goes_on_after_a_restart(tmp_path):
    """Records of two processes are one chain; the report names its anchor, and an anchor noted earlier still fits."""
    write_log(tmp_path, 5)
    noted = _verify(tmp_path).anchor
    write_log(tmp_path, 4)
    report = _verify(tmp_path, noted=noted)
    assert (report.anchor.count, report.ahead, report.torn) == (9, False, False)
    assert f"9:{report.anchor.mac}" in str(report)
    with pytest.raises(AuditError, match="noted anchor of 5 records is another log's"):
        _verify(tmp_path, noted=noted.model_copy(update={"mac": "0" * 64}))


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_is_found(tmp_path, edit):
    """An edited, deleted, doubled, swapped, forged or cut record, and an anchor put back, end in one line each."""
    write_log(tmp_path / "whole", 12)
    rng = random.Random(edit)
    for attempt in range(15):
        home = tmp_path / f"copy-{attempt}"
        shutil.copytree(tmp_path / "whole", home)
        tampered(home, edit, rng)
        with pytest.raises(AuditError) as caught:
            _verify(home)
        assert "\n" not in str(caught.value)


def test_what_was_written_before_cannot_be_forged_with_the_key_of_now(tmp_path):
    """Whoever has the device, its key and its anchor, but not the first key, cannot rewrite an older record."""
    write_log(tmp_path, 6)
    key = json.loads((tmp_path / "audit/key.json").read_bytes())
    first = (tmp_path / "anchor/first.key").read_text().strip()
    assert first not in (tmp_path / "audit/key.json").read_text()
    macs = [json.loads(line)["mac"] for line in (tmp_path / "audit/log.jsonl").read_bytes().splitlines()]
    assert key["mac"] == macs[-1]
    assert key["key"] not in macs


@pytest.mark.parametrize("name", ["audit.after_line", "audit.after_key", "durable.before_rename"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_crash_is_mended_and_not_tampering(tmp_path, name, nth):
    """A process killed between line, key and anchor leaves a log that verifies, and the next start loses no record."""
    write_log(tmp_path, 3)
    child = os.fork()
    if child == 0:
        os.environ["FEDNESTED_FAILPOINT"] = f"{name}:{nth}"
        write_log(tmp_path, 2, first=3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    report = _verify(tmp_path)
    assert 4 <= report.anchor.count <= 5
    write_log(tmp_path, 2, first=report.anchor.count - 1)  # the last decision again, as a restarted sidecar decides
    again = _verify(tmp_path)
    assert (again.anchor.count, again.ahead) == (report.anchor.count + 1, False)


def test_a_torn_line_is_no_record(tmp_path):
    """Half a line is what a power cut leaves; it is told, removed at the next start, and no cut is excused by it."""
    write_log(tmp_path, 3)
    log = tmp_path / "audit/log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"decision":"rel')
    assert _verify(tmp_path).torn
    write_log(tmp_path, 1, first=3)
    assert (_verify(tmp_path).torn, _verify(tmp_path).anchor.count) == (False, 4)
    log.write_bytes(whole[:-5])
    with pytest.raises(AuditError, match="the end was cut off"):
        _verify(tmp_path)


@pytest.mark.parametrize(
    "edit", ["cut", "cut inside", "last edited", "key gone", "anchor gone", "anchor newer", "two more"]
)
def test_the_sidecar_does_not_go_on_with_an_altered_log(tmp_path, edit):
    """A log whose end is not what key and anchor say stops the device at its start: no release without a record."""
    write_log(tmp_path, 4)
    log, anchor = places(tmp_path)
    lines = log.read_bytes().splitlines(keepends=True)
    if edit == "cut":
        log.write_bytes(b"".join(lines[:-1]))
    elif edit == "cut inside":
        log.write_bytes(b"".join(lines)[:-1])
    elif edit == "last edited":
        log.write_bytes(b"".join(lines[:-1]) + lines[-1].replace(b"released", b"refused_"))
    elif edit == "key gone":
        (tmp_path / "audit/key.json").unlink()
    elif edit == "anchor gone":
        anchor.unlink()
    elif edit == "anchor newer":
        anchor.write_text(json.dumps({"count": 5, "mac": "0" * 64}))
    else:
        log.write_bytes(b"".join([*lines, lines[-1], lines[-1]]))
    with pytest.raises(AuditError) as caught:
        AuditLog(tmp_path / "audit", anchor=tmp_path / "anchor")
    assert "\n" not in str(caught.value)


def test_a_full_disk_stops_the_release(tmp_path, monkeypatch):
    """A decision that cannot be written raises before anybody acts on it, and is written at the next try."""
    log = AuditLog(tmp_path / "audit", anchor=tmp_path / "anchor")
    decision = Decision(decision="released", time_s=1.0, policy_version=1, sequence=0)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="nothing leaves without a record"):
            log.append(decision)
    AuditLog(tmp_path / "audit", anchor=tmp_path / "anchor").append(decision)
    assert _verify(tmp_path).anchor.count == 1


def test_records_hold_no_text():
    """A rule is a word of ours, and no field takes anything else that could be text."""
    for field in ({"rule": "the king said"}, {"payload_sha256": "king"}, {"note": "king"}, {"sequence": "king"}):
        with pytest.raises(ValueError, match=r"validation error"):
            Decision(decision="refused", time_s=0.0, policy_version=1, **field)

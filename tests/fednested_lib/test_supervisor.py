"""`run-client` as a parent of two: what it starts, what it says, and that nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from benchmarks.isolation_scene import NotPossible, attack
from benchmarks.rows_isolation import KINDS
from fednested_lib.config import load_tier2
from fednested_lib.errors import ConfigError, IsolationError
from fednested_lib.isolation import Isolation, probe
from fednested_lib.rooms import ROOMS
from fednested_lib.signing import Signer
from fednested_lib.supervisor import plan
from tests.policies import pin_policy

PATIENCE_S = 180.0
CHILD = """
import os, signal, sys, time
from pathlib import Path
role, home = sys.argv[1], Path(sys.argv[3]).parent
other = home / ("trainer.pid" if role == "sidecar" else "sidecar.pid")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
(home / f"{role}.pid").write_text(str(os.getpid()))
end = os.environ.get(role.upper())
if end:
    while not other.exists() or not other.read_text():  # its end kills the other, which would never say its pid
        time.sleep(0.01)
    os.write(int(os.environ["FEDNESTED_LAST_WORDS"]), b"loss is nan:\\x1b lower it")
    sys.exit(int(end))
while True:
    time.sleep(0.05)
"""
PARENT = """
import sys
from pathlib import Path
from fednested_lib import cli
from fednested_lib.config import load_tier2
from fednested_lib.supervisor import supervise
from fednested_lib.errors import FednestedError
path = Path(sys.argv[1])
try:
    supervise(load_tier2(path), path, print, [sys.executable, str(path.parent / "child.py")])
except FednestedError as error:
    cli._fail(str(error), error.exit_code)
"""


@pytest.fixture
def path(tmp_path) -> Iterator[Path]:
    """A device's configuration beside stand-ins for its two processes, which end with the test, also if it fails."""
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    document = {
        "client_id": "romeo",
        "key": "device.key",
        "home": "home",
        "data": "text.jsonl",
        "blobs_uri": "blobs",
        "payloads_uri": "payloads",
        "log": {"bootstrap": "127.0.0.1:1", "timeout_s": 1},
        "control": {"public_key": Signer.generate().public_key},
        "policy": pin_policy(tmp_path),
    }
    Signer.generate().save(tmp_path / "device.key")
    path = tmp_path / "tier2.yaml"
    path.write_text(yaml.safe_dump(document))
    yield path
    for file in tmp_path.glob("*.pid"):
        pid = int(file.read_text() or 0)
        with suppress(OSError):
            if str(tmp_path) in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)


def _start(path: Path, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PARENT, str(path)]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _eventually(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _pids(path: Path) -> list[int]:
    files = [path.parent / f"{role}.pid" for role in ("sidecar", "trainer")]
    _eventually(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _gone(pids: list[int]) -> bool:
    return not any(map(_lives, pids))


def test_sigterm_ends_both_and_is_no_error(path):
    """Whoever stops the device finds neither process afterwards, and exit code 0."""
    parent = _start(path)
    pids = _pids(path)
    parent.terminate()
    out, err = parent.communicate(timeout=PATIENCE_S)
    assert (parent.returncode, _gone(pids)) == (0, True), err
    assert "isolation " in out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a killed parent")
def test_a_killed_parent_leaves_no_process_behind(path):
    """SIGKILL of run-client takes sidecar and trainer with it."""
    parent = _start(path)
    pids = _pids(path)
    parent.kill()
    parent.communicate(timeout=PATIENCE_S)
    _eventually(lambda: _gone(pids))


@pytest.mark.parametrize("role", ["sidecar", "trainer"])
def test_a_child_that_fails_ends_the_other_and_its_words_are_the_last_line(path, role):
    """One clear error, without what a terminal would obey, and the child's own exit code."""
    parent = _start(path, **{role.upper(): "10"})
    pids = _pids(path)
    _, err = parent.communicate(timeout=PATIENCE_S)
    assert err.splitlines()[-1] == f"fednested: {role}: loss is nan:  lower it"
    assert (parent.returncode, _gone(pids)) == (10, True)


def test_a_child_that_is_killed_is_named_with_its_signal(path):
    """What the kernel killed for want of memory is not taken for an orderly end."""
    parent = _start(path)
    pids = _pids(path)
    os.kill(pids[1], signal.SIGKILL)
    _, err = parent.communicate(timeout=PATIENCE_S)
    assert err.splitlines()[-1].startswith("fednested: trainer was killed by SIGKILL")
    assert (parent.returncode, _gone(pids)) == (137, True)


def test_run_client_says_what_its_sidecar_says(path):
    """The real command on a broker that is not there: one line with the remedy, the sidecar's exit code."""
    command = [sys.executable, "-m", "fednested_lib.cli", "tier2", "run-client", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 5, done.stderr
    assert done.stderr.splitlines()[-1].startswith("fednested: sidecar: ")
    assert "127.0.0.1:1" in done.stderr.splitlines()[-1]
    assert sorted(each.name for each in (path.parent / "home").iterdir()) == sorted(ROOMS)


def test_less_isolation_than_required_is_refused_with_the_remedy():
    """Each level holds what is above it; the refusal says what is missing."""
    best = Isolation(network=True, users=True, sockets=True)
    one_user = Isolation(network=True, users=False, sockets=True)
    open_net = Isolation(network=False, users=True, sockets=True, reason="unshare: Operation not permitted")
    for wanted in ("none", "network", "users"):
        best.require(wanted)
    one_user.require("network")
    with pytest.raises(IsolationError, match="require is users, reached is network: start as root"):
        one_user.require("users")
    with pytest.raises(IsolationError, match="require is network, reached is none.*Operation not permitted"):
        open_net.require("network")


def test_users_are_checked_before_anything_starts(path):
    """Users that do not exist, or that nobody can become, stop the device with their name."""
    config = load_tier2(path)
    named = config.isolation.model_copy(update={"trainer_user": "no-such-user-1", "sidecar_user": "no-such-user-2"})
    remedy = "no-such-user-1, which does not exist" if os.getuid() == 0 else "start it as root"
    with pytest.raises(ConfigError, match=remedy):
        plan(config.model_copy(update={"isolation": named}), path)
    text = path.read_text() + "isolation: {trainer_user: fed, sidecar_user: fed}\n"
    path.write_text(text)
    with pytest.raises(ConfigError, match="two different users"):
        load_tier2(path)


def test_a_confined_process_sees_no_network():
    """What is printed as reached was seen from inside, by a process that was confined and ended."""
    found, complaints = probe(None, lambda: ["seen"])
    assert complaints == ["seen"]
    if sys.platform != "linux" or found.reason:
        pytest.skip(f"no namespace here: {found.reason}")
    assert (found.level, found.sockets) == ("network", True)


def test_a_hostile_trainer_gets_nowhere():
    """Every attempt in the trainer's place fails, each of which works as root without confinement."""
    try:
        found = attack(users=True)
    except NotPossible as reason:
        pytest.skip(f"short, not shown here: {reason}")
    assert found.worked(*KINDS) == []
    assert found.refused(*KINDS)[1] >= 20
    assert {name for name, why in found.attempts["own"].items() if why is not None} == set()

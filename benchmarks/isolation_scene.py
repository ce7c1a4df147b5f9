"""A device with a real sidecar on a real broker and a hostile trainer in the trainer's place.

Both are started by `supervisor.launch`, as `run-client` does it, under two users that every Linux has. A control runs
the same attempts as root without confinement, on a device of its own: an attempt that fails there, too, would prove
nothing. `UNPROVEN` names those few that need what a machine may not have.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pwd import getpwnam

import yaml

from benchmarks.results import ROOT
from fednested_lib.config import load_tier2
from fednested_lib.log import TOPICS, KafkaLog
from fednested_lib.rooms import ROOMS
from fednested_lib.signing import Signer
from fednested_lib.supervisor import Child, Plan, launch, plan
from services.embedded import HOST, EmbeddedBroker
from tests.policies import pin_policy

TRAINER, SIDECAR = "nobody", "daemon"
INTRUDER = Path(__file__).with_name("intruder.py")
UNPROVEN = {"tcp to an address outside", "tcp over ipv6", "name look-up", "io_uring", "udp to the host"}
PATIENCE_S = 180.0


class NotPossible(Exception):
    """This machine cannot show it; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one intruder found: attempt → what refused it, None when it worked."""

    level: str
    attempts: dict[str, dict[str, str | None]]

    def refused(self, *kinds: str) -> tuple[int, int]:
        """Return how many attempts of some kinds were refused, of how many."""
        chosen = [why for kind in kinds for why in self.attempts[kind].values()]
        return sum(why is not None for why in chosen), len(chosen)

    def worked(self, *kinds: str) -> list[str]:
        """Return the attempts that were not refused."""
        return [name for kind in kinds for name, why in self.attempts[kind].items() if why is None]


def python_for(uid: int) -> str:
    """Return an interpreter of this version that a user may run.

    Raises:
        NotPossible: there is none.
    """
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for each in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        if _runs(each, uid):
            return each
    raise NotPossible(f"uid {uid} may run no {version}: install one outside of root's home")


def _runs(path: str, uid: int) -> bool:
    try:
        return subprocess.run([path, "-c", ""], user=uid, group=uid, extra_groups=[], check=False).returncode == 0
    except OSError:
        return False


def environment() -> dict[str, str]:
    """Return an environment in which any interpreter of this version finds the packages and this checkout."""
    places = [str(ROOT), *(each for each in sys.path if each.endswith("site-packages"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONDONTWRITEBYTECODE": "1"}


@contextmanager
def device(root: Path, broker: EmbeddedBroker, users: bool) -> Iterator[tuple[Path, Plan, Child]]:
    """Make a device and start its sidecar; yields its directory, the plan and the sidecar."""
    sidecar_uid = getpwnam(SIDECAR).pw_uid if users else 0
    root.mkdir()
    root.chmod(0o755)
    (root / "text.jsonl").write_text('{"text": "nobody trains on this"}\n')
    Signer.generate().save(root / "device.key")
    os.chown(root / "device.key", sidecar_uid, -1)
    document = {
        "client_id": "romeo",
        "key": "device.key",
        "home": "home",
        "data": "text.jsonl",
        "blobs_uri": "source",
        "payloads_uri": "payloads",
        "log": {"bootstrap": broker.bootstrap},
        "control": {"public_key": Signer.generate().public_key},
        "policy": pin_policy(root),
        "isolation": {"trainer_user": TRAINER, "sidecar_user": SIDECAR} if users else {},
    }
    path = root / "tier2.yaml"
    path.write_text(yaml.safe_dump(document))
    python = python_for(sidecar_uid)
    how = plan(load_tier2(path), path, python)
    with ExitStack() as stack:
        command = [python, "-m", "fednested_lib.cli", "tier2", "sidecar", "--config", str(path)]
        sidecar = launch("sidecar", how, command, environment())
        stack.callback(_end, sidecar)
        _wait_for(root / "home/orders/orders.json", sidecar)
        blob = root / "home/blobs/00/blob"  # a stand-in: nothing is published here
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(b"x")
        os.chown(blob, sidecar_uid, -1)
        yield root, how, sidecar


def _end(child: Child) -> None:
    child.process.kill()
    child.process.wait()


def _wait_for(path: Path, child: Child) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        if child.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the sidecar did not come up: {child.last_words()}")
        time.sleep(0.05)


def intrude(root: Path, how: Plan, sidecar: Child, broker: EmbeddedBroker, *, confined: bool) -> Outcome:
    """Run the intruder in the trainer's place, or, as the control, as root."""
    targets, name = root / "targets.json", f"fednested-{os.getpid()}-{root.name}"
    with socket.socket(socket.AF_UNIX) as by_path, socket.socket(socket.AF_UNIX) as abstract:
        by_path.bind(str(root / "socket"))
        os.chmod(root / "socket", 0o777)  # whoever may open a socket may talk to it
        abstract.bind(f"\0{name}")
        for each in (by_path, abstract):
            each.listen()
        targets.write_text(json.dumps(_targets(root, sidecar, broker, name)))
        user = how.accounts["trainer"].uid if how.accounts and confined else 0
        command = [python_for(user), "-I", "-S", str(INTRUDER), str(targets)]
        if not confined:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
            return Outcome(level="control", attempts=json.loads(done.stdout))
        with tempfile.TemporaryFile() as told:
            child = launch("trainer", how, command, stdout=told.fileno())
            if child.process.wait(PATIENCE_S) != 0:
                raise RuntimeError(f"the intruder ended with {child.process.returncode}")
            told.seek(0)
            return Outcome(level=how.isolation.level, attempts=json.loads(told.read()))


def _targets(root: Path, sidecar: Child, broker: EmbeddedBroker, abstract: str) -> dict:
    home, private = root / "home", ("sidecar", "outbox")
    hidden = [path for room in private for path in sorted((home / room).rglob("*")) if path.is_file()]
    audit = [path for path in hidden if home / "sidecar" in path.parents]
    if not any("audit" in path.parts for path in audit):
        raise RuntimeError(
            f"the sidecar has no audit log in {home / 'sidecar'}: the attempts on it would prove nothing"
        )
    foreign = [home / "orders/orders.json", home / "blobs/00/blob", home / "outbox/outbox.db", *audit]
    foreign += [root / name for name in ("tier2.yaml", "policy.yaml", "policy.yaml.sig", "device.key")]
    return {
        "root": str(root),
        "broker": [HOST, broker.port],
        "unix_path": str(root / "socket"),
        "unix_abstract": abstract,
        "sidecar": sidecar.process.pid,
        "address": int(Path(f"/proc/{sidecar.process.pid}/maps").read_text().partition("-")[0], 16),
        "own": str(home / "trainer"),
        "secret_files": [str(root / "device.key"), *map(str, hidden)],
        "secret_rooms": [str(home / room) for room in private],
        "foreign_files": [str(path) for path in foreign],
        "foreign_rooms": [str(home / room) for room, (writer, _) in ROOMS.items() if writer == "sidecar"] + [str(home)],
        "readable": [str(root / "text.jsonl"), str(root / "tier2.yaml"), *map(str, foreign[:2])],
        "writable": [str(home / "spool"), str(home / "trainer")],
    }


def attack(*, users: bool) -> Outcome:
    """Let the intruder loose on a device, and the control on another.

    Args:
        users: two users and a network namespace, as root; else one user and the namespace.

    Raises:
        NotPossible: this machine does not allow it.
        RuntimeError: an attempt that is refused proves nothing: the control could not do it either.
    """
    if os.getuid() != 0:
        raise NotPossible("only root can start two users, and run the control")
    found = {}
    with tempfile.TemporaryDirectory() as scratch, EmbeddedBroker(Path(scratch) / "broker") as broker:
        Path(scratch).chmod(0o755)
        log = KafkaLog(broker.bootstrap)
        log.create_topics(TOPICS)
        log.close()
        for confined in (False, True):
            with device(Path(scratch) / f"device-{confined}", broker, users) as (root, how, sidecar):
                if how.isolation.level != ("users" if users else "network"):
                    raise NotPossible(str(how.isolation))
                found[confined] = intrude(root, how, sidecar, broker, confined=confined)
    unproven = [
        f"{kind}: {name} ({why})"
        for kind, attempts in found[False].attempts.items()
        for name, why in attempts.items()
        if why is not None and name not in UNPROVEN
    ]
    if unproven:
        raise RuntimeError(f"root without confinement cannot do this either: {'; '.join(unproven)}")
    return found[True]

"""`run-client`: starts the sidecar and the trainer of a device with different rights, and ends when one of them does.

    run-client ─┬─ tier2 sidecar    key, broker, policy; its own user when it is named
                └─ tier2 trainer    data; an empty network namespace, no sockets, its own user when it is named

Nothing is restarted silently: when one ends, the other is ended too, and the reason is the last line. Both die when
this process does, by SIGKILL too (Linux).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from fednested_lib.config import Tier2Config
from fednested_lib.errors import ConfigError, ProcessEnded
from fednested_lib.isolation import Account, Isolation, account, become, confine_trainer, die_with, probe
from fednested_lib.rooms import prepare_rooms
from fednested_lib.stopping import sigterm

LAST_WORDS = "FEDNESTED_LAST_WORDS"  # the descriptor for a child's one line of error
COMMAND = (sys.executable, "-m", "fednested_lib.cli", "tier2")
# librdkafka has a dozen threads, each of which would get a heap of its own.
MEMORY: Mapping[str, Mapping[str, str]] = {"sidecar": {"MALLOC_ARENA_MAX": "1"}, "trainer": {}}
GRACE_S = 30.0
_LOOK_S = 0.05

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the two processes of a device will be started."""

    accounts: Mapping[str, Account] | None
    isolation: Isolation

    def confine(self, role: str) -> None:
        """Give up what `role` must not have; in the child, before it becomes that process."""
        user = self.accounts[role] if self.accounts else None
        if role == "trainer":
            confine_trainer(user, network=self.isolation.network)
        else:
            become(user)


@dataclass(frozen=True, kw_only=True)
class Child:
    """A started process and the end of the pipe that its last words come through."""

    role: str
    process: subprocess.Popen
    words: int

    def last_words(self) -> str:
        """Return the child's one line of error, without anything that a terminal would obey."""
        os.set_blocking(self.words, False)
        try:
            told = os.read(self.words, 4096).decode("utf-8", "replace")
        except BlockingIOError:
            told = ""
        return re.sub(r"[^ -~\u00a0-\uffff]", " ", told).strip()


def plan(config: Tier2Config, path: Path, python: str = sys.executable) -> Plan:
    """Look up users, make the directories, and find out which isolation this machine allows.

    Raises:
        ConfigError: a user is missing, or may not read what it needs.
        IsolationError: less than isolation.require.
    """
    named = config.isolation
    accounts = None
    if named.trainer_user is not None:
        if os.getuid() != 0:
            raise ConfigError(
                f"isolation names users, but run-client runs as uid {os.getuid()}, which cannot become them: start it "
                "as root, leave them out, or use the systemd units in deploy/edge/"
            )
        accounts = {"trainer": account(named.trainer_user), "sidecar": account(named.sidecar_user)}
    prepare_rooms(config.home, accounts)
    needed = [str(each) for each in (python, path, config.data, config.heldout) if each is not None]
    isolation, unreadable = probe(
        accounts["trainer"] if accounts else None,
        lambda: [each for each in needed if not os.access(each, os.R_OK)],
    )
    if unreadable and accounts:
        raise ConfigError(
            f"the trainer's user {named.trainer_user} may not read {unreadable[0]}: change its rights, or those of "
            "the directories above it"
        )
    isolation.require(named.require)
    return Plan(accounts=accounts, isolation=isolation)


def launch(
    role: str,
    how: Plan,
    command: list[str],
    environment: Mapping[str, str] | None = None,
    stdout: int | None = None,
) -> Child:
    """Start one of the two processes with the rights that are its own.

    Args:
        role: `sidecar` or `trainer`.
        how: from `plan`.
        command: what to run.
        environment: of the process; default: this one's.
        stdout: descriptor of its output; default: this process's.
    """
    parent = os.getpid()

    def enter() -> None:  # between fork and exec; this process has one thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process, which ends both
        how.confine(role)
        die_with(parent, signal.SIGKILL)  # last: a change of user would undo it

    words, end = os.pipe()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            env={**(os.environ if environment is None else environment), **MEMORY[role], LAST_WORDS: str(end)},
            pass_fds=[end],
            preexec_fn=enter,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ProcessEnded(f"{role} cannot be started: {error}", 1) from error
    finally:
        os.close(end)
    return Child(role=role, process=process, words=words)


def supervise(config: Tier2Config, path: Path, say: Callable[[str], None], command: Sequence[str] = COMMAND) -> None:
    """Run a device as two processes until one ends, or SIGTERM or Ctrl-C arrives.

    Args:
        config: the device's.
        path: of its file, which both processes read.
        say: prints a line.
        command: of the processes, followed by role and configuration.

    Raises:
        ConfigError: users or rights do not fit.
        IsolationError: less than isolation.require.
        ProcessEnded: a process ended with an error, which is the message.
    """
    how = plan(config, path)
    _log.info("device.isolation", reached=how.isolation.level, **vars(how.isolation))
    say(str(how.isolation))
    with ExitStack() as stack:
        stopped = stack.enter_context(sigterm())
        children: list[Child] = []
        stack.callback(_end, children)
        for role in ("sidecar", "trainer"):
            children.append(launch(role, how, [*command, role, "--config", str(path)]))
        first = _first_to_end(children, stopped)
        _end(children)
        for child in [first] if first else children:
            _check(child)


def _first_to_end(children: list[Child], stopped: Callable[[], bool]) -> Child | None:
    while not stopped():
        for child in children:
            if child.process.poll() is not None:
                return child
        time.sleep(_LOOK_S)
    return None


def _end(children: list[Child]) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    deadline = time.monotonic() + GRACE_S
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _log.error("device.killed", role=child.role, grace_s=GRACE_S)
            child.process.kill()
            child.process.wait()


def _check(child: Child) -> None:
    code = child.process.returncode
    if code > 0:
        raise ProcessEnded(f"{child.role}: {child.last_words() or f'exit code {code}, see above'}", code)
    if code < 0 and code != -signal.SIGTERM:  # that is how one is told to end, before it can listen, too
        raise ProcessEnded(
            f"{child.role} was killed by {signal.Signals(-code).name}; the other process was ended, nothing is lost: "
            "start again",
            128 - code,
        )

"""What keeps the trainer from the network and from the sidecar, and what of it is in force.

    users     the trainer runs under another uid than the sidecar, and in an empty network namespace
    network   the same uid, an empty network namespace: nothing phones home, but a hostile trainer could still reach
              what its uid may reach (the key file, the sidecar's memory)
    none      neither

Whatever the level, on Linux the trainer gets no new privileges and a system call filter (seccomp-bpf) that knows no
`socket`: a namespace does not cover UNIX sockets in the file system, the filter does. Levels are probed by doing them
once in a process that ends at once, and never assumed. References: namespaces(7), seccomp(2), prctl(2).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import pwd
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fednested_lib.errors import ConfigError, IsolationError

Level = Literal["none", "network", "users"]
LEVELS: tuple[Level, ...] = ("none", "network", "users")

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 1, 22, 38, 2
# Per machine: its number in seccomp, and the calls that the trainer does without: socket, io_uring_setup, ptrace,
# process_vm_readv, process_vm_writev, pidfd_getfd, setns, unshare, mount, bpf.
_FILTERS = {
    "x86_64": (0xC000003E, (41, 425, 101, 310, 311, 438, 308, 272, 165, 321)),
    "aarch64": (0xC00000B7, (198, 425, 117, 270, 271, 438, 268, 97, 40, 280)),
}
_X32 = 0x40000000  # the second ABI of x86_64, whose call numbers begin here


@dataclass(frozen=True, kw_only=True)
class Account:
    """A user that one of the processes runs as."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """What is in force for a trainer; `reason` says why the network is not empty, if it is not."""

    network: bool
    users: bool
    sockets: bool
    reason: str = ""

    @property
    def level(self) -> Level:
        """The highest level that all of this amounts to."""
        return "none" if not self.network else "users" if self.users else "network"

    def __str__(self) -> str:
        parts = [
            "an empty network" if self.network else f"the host's network ({self.reason})",
            "a uid of its own" if self.users else "the sidecar's uid",
            "no sockets" if self.sockets else "sockets",
        ]
        return f"isolation {self.level}: the trainer has {', '.join(parts)}"

    def require(self, wanted: Level) -> None:
        """Refuse less than was asked for.

        Raises:
            IsolationError: says what is missing, and what helps.
        """
        if LEVELS.index(self.level) >= LEVELS.index(wanted):
            return
        remedy = (
            "start as root with isolation.trainer_user and isolation.sidecar_user set, or use deploy/edge/"
            if self.network
            else f"allow network namespaces ({self.reason}) or use the systemd units in deploy/edge/"
        )
        raise IsolationError(
            f"isolation.require is {wanted}, reached is {self.level}: {remedy}; isolation.require: {self.level} "
            "goes on without"
        )


def account(name: str) -> Account:
    """Look a user up.

    Raises:
        ConfigError: there is none of this name.
    """
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(
            f"isolation names the user {name}, which does not exist: `useradd --system {name}`, or fix the name"
        ) from None
    return Account(name=name, uid=found.pw_uid, gid=found.pw_gid)


def confine_trainer(user: Account | None, *, network: bool) -> None:
    """Give up the network, the rights of root and system calls, for good; for a process about to become the trainer.

    Args:
        user: whom to become, as root; None stays.
        network: whether to move into an empty network namespace.

    Raises:
        OSError: the kernel does not allow the namespace.
    """
    if network and user is not None:
        _unshare(_CLONE_NEWNET)
    elif network:  # in a user namespace of its own, so that root, too, has no right outside it
        uid, gid = os.getuid(), os.getgid()
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    become(user)
    if sys.platform == "linux":
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        with suppress(OSError):  # a kernel without seccomp: `observe` says so
            _filter_calls()


def become(user: Account | None) -> None:
    """Turn from root into a user; None stays who it is. Who may read its files, their directories say (`rooms`)."""
    if user is not None:
        os.setgroups([])
        os.setgid(user.gid)
        os.setuid(user.uid)
        os.umask(0o022)


def die_with(parent: int, number: int) -> None:
    """Have this process killed by a signal when its parent ends, however that ends (Linux).

    Args:
        parent: its pid; if it is gone already, the signal comes now.
        number: of the signal.
    """
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def probe(user: Account | None, may: Callable[[], list[str]] = list) -> tuple[Isolation, list[str]]:
    """Confine a process that ends at once, and tell what it reached.

    Args:
        user: whom the trainer will be.
        may: run inside; returns complaints about what the trainer will need.
    """

    def inside(network: bool) -> dict:
        try:
            confine_trainer(user, network=network)
        except OSError as error:
            return {"reason": f"unshare: {error.strerror}"}
        found = asdict(observe(users=user is not None))
        return {**found, "complaints": may()}

    found = _in_child(lambda: inside(True))
    reason = found.get("reason", "")
    if reason:
        found = {**_in_child(lambda: inside(False)), "reason": reason}
    complaints = found.pop("complaints")
    return Isolation(**found), complaints


def observe(*, users: bool) -> Isolation:
    """Return what holds for this very process; whether users differ, the caller has to know."""
    found = _interfaces()
    others = sorted(found - {"lo"})
    try:
        socket.socket(socket.AF_UNIX).close()
        sockets = False
    except PermissionError:
        sockets = True
    if sys.platform != "linux":
        return Isolation(network=False, users=users, sockets=sockets, reason=f"{sys.platform} has no namespaces")
    reason = f"it sees {', '.join(others[:3])}" if others else ""
    return Isolation(network=not others, users=users, sockets=sockets, reason=reason)


def _interfaces() -> set[str]:
    with suppress(OSError):
        lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
        return {line.partition(":")[0].strip() for line in lines}
    return {"an unknown network"}


def _in_child(call: Callable[[], dict]) -> dict:
    """Run something that cannot be taken back in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(call()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as answer:
        told = answer.read()
    os.waitpid(child, 0)
    if not told:
        raise IsolationError("the trainer's confinement failed without a reason: set isolation.require: none")
    return json.loads(told)


def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _unshare(flags: int) -> None:
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, f"{sys.platform} has no namespaces")
    _check(_libc().unshare(flags))


def _prctl(option: int, argument: int, pointer: object = 0) -> None:
    _check(_libc().prctl(option, ctypes.c_ulong(argument), pointer, 0, 0))


def _filter_calls() -> None:
    """Refuse some system calls with EPERM from now on, in this process and all that it starts."""
    if platform.machine() not in _FILTERS:
        raise OSError(errno.ENOSYS, f"no filter for {platform.machine()}")
    machine, calls = _FILTERS[platform.machine()]
    load, jump_eq, jump_ge, answer = 0x20, 0x15, 0x35, 0x06  # BPF: LD W ABS, JEQ K, JGE K, RET K
    n = len(calls)
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (jump_eq, 0, n + 3, machine),
        (load, 0, 0, 0),  # seccomp_data.nr
        (jump_ge, n + 1, 0, _X32),
        *((jump_eq, n - i, 0, call) for i, call in enumerate(calls)),
        (answer, 0, 0, 0x7FFF0000),  # allow
        (answer, 0, 0, 0x00050000 | errno.EPERM),
    ]
    code = b"".join(struct.pack("HBBI", *each) for each in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(header))

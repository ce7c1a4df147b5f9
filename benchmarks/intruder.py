"""A hostile trainer: tries everything that a trainer must not be able to do, and says what happened.

Run in the trainer's place, standard library alone: `python -I -S intruder.py TARGETS`, a JSON file that says where
things are. Prints one line of JSON: name of the attempt → what refused it, or null when it worked; and under `own` the
things that a trainer must be able to do, likewise.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_NUMBERS = {  # of system calls that Python has no name for
    "x86_64": {"io_uring_setup": 425, "process_vm_readv": 310, "pidfd_getfd": 438, "pidfd_open": 434},
    "aarch64": {"io_uring_setup": 425, "process_vm_readv": 270, "pidfd_getfd": 438, "pidfd_open": 434},
}
Attempt = Callable[[], object]


def _call(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _syscall(name: str, *arguments: object) -> int:
    return _call(_LIBC.syscall(_NUMBERS[os.uname().machine][name], *arguments))


def _connect(family: int, address: object, kind: int = socket.SOCK_STREAM) -> None:
    with socket.socket(family, kind) as made:
        made.settimeout(3)
        made.connect(address)


def network(told: dict) -> Iterator[tuple[str, Attempt]]:
    """Yield the attempts to reach anybody."""
    host, port = told["broker"]
    yield "tcp to the broker", lambda: _connect(socket.AF_INET, (host, port))
    yield "tcp to an address outside", lambda: _connect(socket.AF_INET, ("192.0.2.1", 443))
    yield "tcp over ipv6", lambda: _connect(socket.AF_INET6, ("::1", port))
    yield "tcp listen", lambda: socket.create_server((host, 0)).close()
    yield "udp to the host", lambda: _send_udp(host, port)
    yield "udp bind", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind((host, 0))
    yield "raw ip", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
    yield "packet socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()
    yield "netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()
    yield "unix socket by path", lambda: _connect(socket.AF_UNIX, told["unix_path"])
    yield "unix socket, abstract", lambda: _connect(socket.AF_UNIX, "\0" + told["unix_abstract"])
    yield "unix listen in its own room", lambda: socket.socket(socket.AF_UNIX).bind(f"{told['own']}/socket")
    yield "name look-up", lambda: socket.getaddrinfo("fednested.invalid.example", 443)
    yield "io_uring", lambda: _syscall("io_uring_setup", 1, ctypes.create_string_buffer(120))
    yield "the host's network namespace", lambda: _enter(f"/proc/{told['sidecar']}/ns/net")
    yield "a network namespace of its own", lambda: _call(_LIBC.unshare(0x40000000))


def _send_udp(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.sendto(b"x", (host, port))


def _enter(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _call(_LIBC.setns(descriptor, 0x40000000))
    finally:
        os.close(descriptor)


def reading(told: dict) -> Iterator[tuple[str, Attempt]]:
    """Yield the attempts to read what is the sidecar's."""
    for path in told["secret_files"]:
        yield f"read {_short(path, told)}", lambda path=path: Path(path).read_bytes()
    for path in told["secret_rooms"]:
        yield f"list {_short(path, told)}", lambda path=path: os.listdir(path)
    place = Path(f"/proc/{told['sidecar']}")
    yield "read the sidecar's environment", lambda: (place / "environ").read_bytes()
    yield "read the sidecar's memory", lambda: open(place / "mem", "rb").close()
    yield "list the sidecar's descriptors", lambda: os.listdir(place / "fd")


def writing(told: dict) -> Iterator[tuple[str, Attempt]]:
    """Yield the attempts to change what is not the trainer's."""
    for path in told["foreign_files"]:
        name = _short(path, told)
        yield f"write {name}", lambda path=path: open(path, "r+b").close()
        yield f"replace {name}", lambda path=path: os.replace(_own_file(told), path)
        yield f"chmod {name}", lambda path=path: os.chmod(path, 0o666)
    for path in told["foreign_rooms"]:
        name = _short(path, told)
        yield f"create in {name}", lambda path=path: _create(f"{path}/intruder")
        yield f"remove {name}", lambda path=path: _move(path)


def _create(path: str) -> None:
    Path(path).write_bytes(b"x")
    os.unlink(path)


def _move(path: str) -> None:
    os.rename(path, f"{path}.gone")
    os.rename(f"{path}.gone", path)


def _own_file(told: dict) -> str:
    path = f"{told['own']}/intruder"
    Path(path).write_bytes(b"x")
    return path


def power(told: dict) -> Iterator[tuple[str, Attempt]]:
    """Yield the attempts to rule over the sidecar, or to become somebody else."""
    sidecar = told["sidecar"]
    buffer = ctypes.create_string_buffer(8)
    here = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    there = (ctypes.c_void_p * 2)(told["address"], 8)
    yield "become root", lambda: os.setuid(0)
    yield "take root's group", lambda: os.setgid(0)
    yield "trace the sidecar", lambda: _call(_LIBC.ptrace(16, sidecar, 0, 0))
    yield "copy the sidecar's memory", lambda: _syscall("process_vm_readv", sidecar, here, 1, there, 1, 0)
    yield "take the sidecar's descriptor", lambda: _syscall("pidfd_getfd", _syscall("pidfd_open", sidecar, 0), 1, 0)
    yield "mount", lambda: _mount(told["own"])
    yield "end the sidecar", lambda: os.kill(sidecar, signal.SIGTERM)
    yield "stop the sidecar", lambda: os.kill(sidecar, signal.SIGSTOP)
    yield "kill the sidecar", lambda: os.kill(sidecar, signal.SIGKILL)
    yield "a user namespace", lambda: _call(_LIBC.unshare(0x10000000))


def _mount(path: str) -> None:
    _call(_LIBC.mount(b"none", path.encode(), b"tmpfs", 0, None))
    _call(_LIBC.umount(path.encode()))


def own(told: dict) -> Iterator[tuple[str, Attempt]]:
    """Yield what a trainer has to be able to do."""
    for path in told["readable"]:
        yield f"read {_short(path, told)}", lambda path=path: Path(path).read_bytes()
    for path in told["writable"]:
        yield f"create in {_short(path, told)}", lambda path=path: _create(f"{path}/mine")


def _short(path: str, told: dict) -> str:
    return os.path.relpath(path, told["root"])


def _outcome(attempt: Attempt) -> str | None:
    try:
        attempt()
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror or error}"
    return None


def main(path: str) -> None:
    """Try everything."""
    told = json.loads(Path(path).read_text())
    found: dict[str, dict[str, str | None]] = {}
    for kind in (own, network, reading, writing, power):
        found[kind.__name__] = {name: _outcome(attempt) for name, attempt in kind(told)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])

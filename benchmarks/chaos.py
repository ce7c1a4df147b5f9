"""A proxy between a device and the gateway that does what networks do, in an order that a seed gives.

It understands just enough HTTP/1.1 to see requests and their bytes. Each fault of its plan is done to the first request
that it fits; it counts what was sent or fetched a second time, from the byte ranges on the wire.
"""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

# Kind → how often it comes for a plan of one unit, and the methods it is done to.
KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "error_503": (2, ("PATCH", "POST", "HEAD", "BLOB")),
    "error_429": (1, ("PATCH", "POST")),  # with Retry-After
    "delay": (1, ("PATCH", "POST", "BLOB")),
    "cut_request": (4, ("PATCH", "POST")),  # the connection is reset after a random byte of the body
    "lost_reply": (2, ("PATCH", "POST")),  # reset after the gateway has done it
    "cut_reply": (3, ("BLOB",)),  # reset after a random byte of the answer
    "kill_device": (1, ("PATCH",)),  # SIGKILL after a random byte of the body
}
_RANGE = re.compile(rb"bytes[= ](\d+)-(\d+)")


@dataclass(frozen=True, kw_only=True)
class _Message:
    """A request or an answer: its first line and headers as they came, and how many bytes follow."""

    head: bytes
    length: int

    @property
    def method(self) -> str:
        """The method, `BLOB` for the part of a blob."""
        method, target, _ = self.head.split(b" ", 2)
        return "BLOB" if method == b"GET" and b"/blobs/" in target else method.decode()

    @property
    def name(self) -> bytes:
        """What is asked for, without its query."""
        return self.head.split(b" ", 2)[1].partition(b"?")[0]

    def range(self, header: bytes) -> int:
        """Return the first byte that a range header names."""
        return int(_RANGE.search(self.head, self.head.lower().index(header))[1])


class Chaos:
    """The proxy, on a free port of loopback.

    Args:
        port: the gateway's.
        plan: kinds of faults, in the order in which they are tried.
        seed: of what chance decides.
        share: of the requests that are disturbed while the plan lasts.
        kill: ends the device at once.
        outage: takes the broker away and brings it back; called before a record is passed on.
        outages: how often.
    """

    def __init__(
        self,
        port: int,
        *,
        plan: list[str],
        seed: int,
        share: float = 0.4,
        kill: Callable[[], None] = lambda: None,
        outage: Callable[[], None] = lambda: None,
        outages: int = 0,
    ):
        self._upstream, self._plan, self._rng, self._share = port, list(plan), random.Random(seed), share
        self._kill, self._outage, self._outages = kill, outage, outages
        self._lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self.sent_bytes = self.fetched_bytes = 0
        self.again: dict[str, list[int]] = {"PATCH": [0], "BLOB": [0]}  # bytes that came a second time, per restart
        self._reached: dict[bytes, int] = {}
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def left(self) -> int:
        """Faults of the plan that are still to come."""
        return len(self._plan) + self._outages

    def close(self) -> None:
        """Stop listening."""
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        gateway = socket.create_connection(("127.0.0.1", self._upstream))
        for each in (client, gateway):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while (request := _read_head(client)) is not None:
                if not self._exchange(request, client, gateway):
                    break
        except OSError:
            pass  # one of the two is gone, which is what this is for
        finally:
            _reset(client)
            gateway.close()

    def _exchange(self, request: _Message, client: socket.socket, gateway: socket.socket) -> bool:
        """Pass one request and its answer on, or disturb it; tells whether the connection goes on."""
        fault = self._choose(request.method)
        if fault in ("error_503", "error_429"):
            self._note_sent(request, _read(client, request.length))
            status = b"503 Service Unavailable" if fault == "error_503" else b"429 Too Many Requests"
            wait = b"retry-after: 0\r\n" if fault == "error_429" else b""
            client.sendall(b"HTTP/1.1 " + status + b"\r\n" + wait + b"content-length: 0\r\n\r\n")
            return True
        if fault in ("cut_request", "kill_device"):
            part = _read(client, self._rng.randrange(request.length))
            self._note_sent(request, part)
            gateway.sendall(request.head + part)
            if fault == "kill_device":
                self._kill()
            return False
        if fault == "delay":
            time.sleep(0.1)
        if fault == "outage":
            self._outage()
        body = _read(client, request.length)
        self._note_sent(request, body)
        gateway.sendall(request.head + body)
        answer = _read_head(gateway, of=request.method)
        if answer is None:
            return False
        whole = _read(gateway, answer.length)
        if fault == "lost_reply":
            return False
        passed = whole[: self._rng.randrange(len(whole))] if fault == "cut_reply" and whole else whole
        self._note_fetched(request, answer, passed)
        client.sendall(answer.head + passed)
        return len(passed) == len(whole) and b"\r\nconnection: close" not in answer.head.lower()

    def _choose(self, method: str) -> str | None:
        with self._lock:
            if method == "POST" and self._outages and self.done["POST"] >= 3 * (1 + self.done["outage"]):
                self._outages -= 1
                self.done["outage"] += 1
                return "outage"
            self.done["POST"] += method == "POST"
            fitting = [kind for kind in self._plan if method in KINDS[kind][1]]
            if not fitting or self._rng.random() > self._share:
                return None
            self._plan.remove(fitting[0])
            self.done[fitting[0]] += 1
            return fitting[0]

    def _note_sent(self, request: _Message, part: bytes) -> None:
        if request.method == "PATCH":
            self.sent_bytes += len(part)
            self._note("PATCH", request.name, request.range(b"content-range"), len(part))

    def _note_fetched(self, request: _Message, answer: _Message, part: bytes) -> None:
        if request.method == "BLOB" and b" 206 " in answer.head[:20]:
            self.fetched_bytes += len(part)
            self._note("BLOB", request.name, request.range(b"range"), len(part))

    def _note(self, way: str, name: bytes, first: int, length: int) -> None:
        """Count the bytes of this range that passed here before."""
        reached = self._reached.get(name, 0)
        if first < reached:
            self.again[way].append(min(reached, first + length) - first)
        self._reached[name] = max(reached, first + length)


def make_plan(faults: int, seed: int) -> list[str]:
    """Return at least `faults` kinds in a seeded order, each in its share."""
    unit = [kind for kind, (times, _) in KINDS.items() for _ in range(times)]
    plan = unit * -(-faults // len(unit))
    random.Random(seed).shuffle(plan)
    return plan


def _read_head(connection: socket.socket, of: str = "") -> _Message | None:
    """Read up to the empty line; None if the connection ended before."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)  # a head is short, and nothing behind it must be taken
        if not byte:
            return None
        head += byte
    found = re.search(rb"\r\ncontent-length: *(\d+)", head.lower())
    empty = of == "HEAD" or (head.startswith(b"HTTP/") and head[9:12] == b"204")
    return _Message(head=head, length=0 if empty or found is None else int(found[1]))


def _read(connection: socket.socket, length: int) -> bytes:
    pieces = []
    while length:
        piece = connection.recv(min(length, 1 << 16))
        if not piece:
            raise ConnectionResetError
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def _reset(connection: socket.socket) -> None:
    """Close with a reset, as a network that fails does, not with an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()

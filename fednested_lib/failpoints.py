"""Named points at which a test may kill this process, between every two durable steps.

`FEDNESTED_FAILPOINT=name` (or `name:k` for the k-th time) sends SIGKILL to the process when it passes that point, as
a power cut would. `FEDNESTED_FAILPOINT_TRACE=path` appends the name of every point that is passed to a file or pipe,
so that who kills at random times knows between which durable steps. Without the variables a failpoint costs two
dictionary look-ups.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_hits: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Say that this point is passed, and die here, if the environment says so."""
    trace = os.environ.get("FEDNESTED_FAILPOINT_TRACE")
    if trace:
        _note(trace, name)
    wanted = os.environ.get("FEDNESTED_FAILPOINT")
    if not wanted:
        return
    target, _, nth = wanted.partition(":")
    if target != name:
        return
    _hits[name] += 1
    if _hits[name] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)


def _note(trace: str, name: str) -> None:
    descriptor = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{name}\n".encode())  # at once: nothing is buffered when the kill comes
    os.close(descriptor)

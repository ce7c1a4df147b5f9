"""Named points at which a test may kill this process, between every two durable steps.

`FEDNESTED_FAILPOINT=name` (or `name:k` for the k-th time) sends SIGKILL to the process when it passes that point, as
a power cut would. Without the variable a failpoint costs one dictionary look-up.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_hits: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Die here if the environment says so."""
    wanted = os.environ.get("FEDNESTED_FAILPOINT")
    if not wanted:
        return
    target, _, nth = wanted.partition(":")
    if target != name:
        return
    _hits[name] += 1
    if _hits[name] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)

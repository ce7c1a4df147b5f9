"""How many processes have room here: by cores, by the quota of the container, and by its memory.

A pod sees every core of its node: its limits are quotas of the control group (kernel documentation, cgroup-v2), which
affinity does not show. Where nothing is limited the cores decide.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # version 1 says "none" by a number near 2**63


def processes_that_fit(bytes_each: int, root: Path = CGROUPS) -> int:
    """Return how many processes to start beside this one, ≥ 1.

    Args:
        bytes_each: Memory of one, and of this one.
        root: Of the control group of this container; versions 1 and 2 are read.
    """
    fitting = [len(os.sched_getaffinity(0))]
    if quota := _quota(root):
        fitting.append(math.ceil(quota))
    if limit := _memory_limit(root):
        fitting.append(limit // bytes_each - 1)
    return max(1, min(fitting))


def _quota(root: Path) -> float | None:
    """Return the CPUs that this container may use at a time; None: all."""
    both = _words(root / "cpu.max") or [
        *_words(root / "cpu/cpu.cfs_quota_us"),
        *_words(root / "cpu/cpu.cfs_period_us"),
    ]
    quota, period = both if len(both) == 2 else ("max", "1")
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _memory_limit(root: Path) -> int | None:
    """Return the bytes that this container may hold; None: any."""
    (limit,) = _words(root / "memory.max") or _words(root / "memory/memory.limit_in_bytes") or ["max"]
    return None if limit == "max" or int(limit) >= NO_LIMIT else int(limit)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []

"""How a loop of the device waits, and how it is told to end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_S = 0.2  # how often each side looks at what the other wrote
_SLICE_S = 0.1


def wait(seconds: float, until: Callable[[], bool]) -> None:
    """Sleep in slices until the time is over or `until` holds."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not until():
        time.sleep(min(left, _SLICE_S))


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM into a flag while inside; a thread other than the main one gets a flag that never rises."""
    raised: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _frame: raised.append(number))
    try:
        yield lambda: bool(raised)
    finally:
        signal.signal(signal.SIGTERM, previous)

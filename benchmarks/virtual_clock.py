"""Devices and rounds on a virtual clock: who finishes when, who waits for whom; what they do is the caller's.

Synchronous, a device that has sent waits for the next version: a round lasts as long as its slowest device.
Asynchronous, it starts again at once from the newest version: devices together send Σ 1/duration updates a second.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

Duration = Callable[[int], float]  # device -> seconds that its next local update takes


def play(
    n_devices: int,
    *,
    window: int,
    waits: bool,
    duration: Duration,
    start: Callable[[int], None],
    finish: Callable[[int], None],
) -> Iterator[float]:
    """Let devices start and finish in the order of the clock, and yield whenever a buffer is full.

    The caller folds the buffer before it goes on, so what starts at that moment starts from the new version. Devices
    that finish at the same time do so in the order of their numbers.

    Args:
        n_devices: they are numbered from 0; all start at 0 s.
        window: updates that fill the buffer, at most `n_devices` if they wait.
        waits: whether a device that has finished waits until the buffer is full.
        duration: drawn once per local update, when it starts.
        start: a device takes the newest version.
        finish: it hands over what it made of the version it took.

    Returns:
        An endless iterator over the seconds of full buffers, in rising order.
    """
    assert window >= 1
    assert window <= n_devices or not waits
    ready, running, now, n_buffered = list(range(n_devices)), [], 0.0, 0
    while True:
        for device in ready:
            start(device)
            heapq.heappush(running, (now + duration(device), device))
        ready = []
        while not ready or (waits and n_buffered):
            now, device = heapq.heappop(running)
            finish(device)
            ready.append(device)
            n_buffered += 1
            if n_buffered == window:
                n_buffered = 0
                yield now

"""Shows on a terminal how many device updates have arrived since the last cut, while a round waits for them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fednested_lib.errors import FednestedError
from fednested_lib.log import UPDATES
from tier1.federation import Federation, open_federation

POLL_S = 0.5


@contextmanager
def arrivals(config: Path) -> Iterator[None]:
    """Draw a bar of arrived updates inside the block; without a terminal do nothing."""
    if not sys.stderr.isatty():
        yield
        return
    fed, done = open_federation(config), threading.Event()
    watcher = threading.Thread(target=_watch, args=(fed, done))
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        fed.close()


def _watch(fed: Federation, done: threading.Event) -> None:
    from tqdm import tqdm

    consumed = sum(fed.chain.state().offsets.values())
    with tqdm(total=fed.config.window.min_updates, desc="   updates", unit="update", leave=False) as bar:
        while not done.wait(POLL_S):
            try:
                arrived = sum(high for _, high in fed.log.watermarks(UPDATES).values()) - consumed
            except FednestedError:
                continue  # the round itself says what is wrong
            bar.update(min(arrived, bar.total) - bar.n)
            if arrived >= bar.total:
                return

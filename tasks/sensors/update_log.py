"""How a sensor reaches the update log: opened for one look, with a bound that Flyte's propeller does not run into."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tier1.loops.records import Window

if TYPE_CHECKING:
    from fednested_lib.log import UpdateLog

TIMEOUT_S = 2.0  # one look makes up to four calls, and propeller gives a connector ten seconds


@contextmanager
def connected(window: Window) -> Iterator["UpdateLog"]:
    """Open the window's log, and let go of its connections afterwards."""
    from fednested_lib.config import LogConfig
    from tier1.federation import open_log

    log = open_log(LogConfig(bootstrap=window.bootstrap, timeout_s=TIMEOUT_S))
    try:
        yield log
    finally:
        log.close()

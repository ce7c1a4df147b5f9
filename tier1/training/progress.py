"""A progress bar for long training: on a terminal a bar, in a log a line every tenth."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(steps: int, label: str, *, shown: bool = True) -> Iterator[Callable[[int, float], None]]:
    """Yield a callback `(step from 1, loss)` that shows how far training is, if it is to be shown."""
    from tqdm import tqdm

    if not shown:
        yield lambda step, loss: None
        return
    started = time.monotonic()
    terminal = sys.stderr.isatty()
    with tqdm(total=steps, desc=label, unit="step", disable=not terminal, leave=True) as bar:

        def on_step(step: int, loss: float) -> None:
            bar.update(step - bar.n)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if not terminal and (step == steps or step % max(1, steps // 10) == 0):
                elapsed_s = time.monotonic() - started
                sys.stderr.write(f"{label}: step {step}/{steps}  loss {loss:.3f}  {elapsed_s:.0f} s\n")
                sys.stderr.flush()

        yield on_step

"""Answer the questions of a locally run workflow without a person at the terminal.

Flyte's local gate reads a line from standard input. `answer_gates` puts a provider in its place, so that a command can
take the decision as a flag (in the local profile only, and recorded as such) and a demo can hand over a signed token
that was made after the question was asked.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Answers(io.TextIOBase):
    """Standard input whose every line is one answer; it has no file descriptor, so that `input()` calls `readline`."""

    def __init__(self, provider: Callable[[], str]):
        self._provider = provider

    def readable(self) -> bool:
        return True

    def readline(self, size: int = -1, /) -> str:
        answer = " ".join(self._provider().split())
        return f"{answer}\n" if answer else ""  # an empty line would be asked again for ever; the end of input stops


@contextmanager
def answer_gates(provider: Callable[[], str]) -> Iterator[None]:
    """Answer every gate of workflows run inside this block, in this process.

    Args:
        provider: returns the next answer; called once per question, when it is asked. An empty answer aborts the
            workflow, and what was asked about goes on waiting.
    """
    stdin = sys.stdin
    sys.stdin = _Answers(provider)
    try:
        yield
    finally:
        sys.stdin = stdin

"""A finding: what was looked at, its state, the value, the bound it is held to, and what to do.

ok       as it should be
warning  the loops turn, but somebody should know
bad      a loop will stop at this
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fednested_lib.errors import FednestedError

State = Literal["ok", "warning", "bad"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the examination.

    Args:
        what: the thing, e.g. ``topic updates.tier1``.
        state: see the module's docstring.
        value: what was found, with its unit.
        bound: what it is held to; empty where there is no number.
        remedy: what to do; empty when `ok`.
    """

    what: str
    state: State
    value: str
    bound: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        bound = f" (bound: {self.bound})" if self.bound else ""
        remedy = f": {self.remedy}" if self.remedy else ""
        return f"{self.state:<8} {self.what:<32} {self.value}{bound}{remedy}"

    def to_document(self) -> dict[str, Any]:
        """Return the finding as JSON."""
        return asdict(self)


def judge(what: str, *, holds: bool, value: str, bound: str, remedy: str, otherwise: State = "bad") -> Finding:
    """Return `ok` when the bound holds, else `otherwise` with the remedy."""
    state: State = "ok" if holds else otherwise
    return Finding(what=what, state=state, value=value, bound=bound, remedy="" if holds else remedy)


def look(what: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield a check's findings; an error of ours that ends it is a finding too, with its own value and remedy."""
    try:
        yield from check()
    except FednestedError as error:
        yield Finding(what=what, state="bad", value=str(error))

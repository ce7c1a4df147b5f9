"""The register of figures: a figure is a function that measures one number, with its unit, bound and cost class.

    @figure("wheel.size", unit="kB", bound="<= 200")
    def wheel_size() -> float:
        '''Size of the wheel that a device downloads.'''

The first line of the docstring is the claim as the README prints it. Modules named `benchmarks/rows_*.py` are found
by themselves. A figure returns its value, or a `Reading` when it repeats a timing; one that cannot be measured raises.
"""

from __future__ import annotations

import importlib
import operator
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

CostClass = Literal["quick", "full", "long"]

# Each class contains the ones before it; the number is the most seconds that all its rows may take together.
BUDGET_S: dict[str, float | None] = {"quick": 300.0, "full": 3600.0, "long": None}

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
_BOUND = re.compile(r"(<=|>=|==|<|>) (-?\d+(?:\.\d+)?(?:e-?\d+)?)")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A value with the range it was taken from."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, repeats: list[float]) -> Reading:
        """Take the median of repeated measurements."""
        return cls(value=median(repeats), low=min(repeats), high=max(repeats))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row: what is measured, in which unit, what it must keep to, and what it costs."""

    name: str
    unit: str
    bound: str | None
    cls: CostClass
    claim: str
    measure: Callable[[], float | Reading]

    def holds(self, value: float) -> bool:
        """Say whether a value keeps to the bound; a figure without one always does."""
        if self.bound is None:
            return True
        relation, limit = _parse(self.bound)
        return _OPERATORS[relation](value, limit)


FIGURES: dict[str, Figure] = {}


def figure(
    name: str, unit: str, bound: str | None = None, cls: CostClass = "quick"
) -> Callable[[Callable[[], float | Reading]], Callable[[], float | Reading]]:
    """Register the decorated function as the figure `name`.

    Args:
        name: Dotted, the part before the first dot is the topic that ONLY= selects.
        unit: As printed, `1` for a plain number.
        bound: `"<= 300"`, `">= 0.6"`, `"== 0"`, or None for a figure that only informs.
        cls: `quick`, `full` or `long`.
    """
    if bound is not None:
        _parse(bound)
    if cls not in BUDGET_S:
        raise ValueError(f"cost class of figure {name} must be one of {', '.join(BUDGET_S)}, got {cls}")

    def register(measure: Callable[[], float | Reading]) -> Callable[[], float | Reading]:
        if name in FIGURES:
            raise ValueError(f"figure {name} is registered twice: choose another name")
        if not measure.__doc__:
            raise ValueError(f"figure {name} has no docstring: its first line is the claim that the README prints")
        claim = measure.__doc__.strip().splitlines()[0]
        FIGURES[name] = Figure(name=name, unit=unit, bound=bound, cls=cls, claim=claim, measure=measure)
        return measure

    return register


def discover() -> list[Figure]:
    """Import every `rows_*.py` of this package and return all figures in the order of their names."""
    package = importlib.import_module("benchmarks")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("rows_"):
            importlib.import_module(f"benchmarks.{module.name}")
    return [FIGURES[name] for name in sorted(FIGURES)]


def select(figures: list[Figure], *, cls: str, only: str = "") -> list[Figure]:
    """Choose the figures of a cost class, cheaper classes included, whose names start with `only`."""
    classes = list(BUDGET_S)[: list(BUDGET_S).index(cls) + 1]
    return [row for row in figures if row.cls in classes and row.name.startswith(only)]


def _parse(bound: str) -> tuple[str, float]:
    match = _BOUND.fullmatch(bound)
    if match is None:
        raise ValueError(f"a bound reads like '<= 300', with one of {', '.join(_OPERATORS)}, got {bound!r}")
    return match[1], float(match[2])

"""Which rule a configuration means: ours, or one that a user registered under the entry point `fednested.rules`.

A user's rule is a function `(gram, prior) -> weights`, or a `rules.Rule` that says how many devices it needs and which
options it has; `examples/custom_rule` is one to copy. What nobody registered, an option that the rule does not have and
a value out of its bound are refused when the configuration is loaded. What a rule returns is checked at every call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import numpy as np

from fednested_lib.errors import ConfigError
from tier1.aggregation.gram import Gram
from tier1.aggregation.rules import RULES, Bound, Rule, weighted_mean

if TYPE_CHECKING:
    from tier1.versions.settings import AggregationSettings

ENTRY_POINTS = "fednested.rules"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A rule with its options filled in."""

    name: str
    rule: Rule
    options: Mapping[str, Any]

    def decides(self, n_devices: int) -> bool:
        """Tell whether the rule has enough devices; if not, the weighted mean is used."""
        return n_devices >= self.rule.min_devices(dict(self.options))

    def weigh(self, gram: Gram | None, prior: np.ndarray) -> np.ndarray:
        """Return a, checked: finite, ≥ 0, one per update, Σ a = 1 unless the rule rescales.

        Raises:
            ConfigError: a user's rule returned something else.
        """
        assert self.rule.weights is not None, "a dense rule has no weights"
        if self.rule.needs_root and (gram is None or gram.root is None):
            return weighted_mean(gram, prior)
        weights = np.asarray(self.rule.weights(gram, prior, **self.options), dtype=np.float64)
        good = weights.shape == prior.shape and np.isfinite(weights).all() and (weights >= 0).all()
        if not good or not (self.rule.rescales or math.isclose(weights.sum(), 1.0, rel_tol=1e-9)):
            raise ConfigError(
                f"aggregation.rule {self.name} returned {weights.tolist()[:8]} for {len(prior)} updates: weights "
                "must be finite, at least 0 and sum to 1; fix the rule or choose another"
            )
        return weights


def choose(settings: AggregationSettings) -> Chosen:
    """Look up the rule of a configuration and check its options.

    Raises:
        ConfigError: nobody registered the rule, it cannot be imported, or an option or combination is out of bounds.
    """
    rule = find_rule(settings.rule)
    unknown = sorted(set(settings.rule_options) - set(rule.options))
    if unknown:
        known = ", ".join(sorted(rule.options)) or "none"
        raise ConfigError(
            f"aggregation.rule_options.{unknown[0]} is no option of rule {settings.rule} (its options: {known}): "
            "remove it"
        )
    options = {
        name: _checked(settings.rule, name, bound, settings.rule_options.get(name, bound.default))
        for name, bound in rule.options.items()
    }
    for field in ("max_expert_norm", "expert_norm_ratio", "max_step_norm", "measure"):
        if rule.dense and getattr(settings, field):
            raise ConfigError(
                f"aggregation.{field} needs a Gram matrix, which rule {settings.rule} does not have: remove it or "
                "choose another rule"
            )
    _check_orthogonal(rule, settings)
    if rule.needs_root and settings.root is None:
        raise ConfigError(
            f"aggregation.rule {settings.rule} needs a root: set aggregation.root to tier1 or a client id"
        )
    return Chosen(name=settings.rule, rule=rule, options=options)


def _check_orthogonal(rule: Rule, settings: AggregationSettings) -> None:
    """Refuse what would turn a projected step back into the protected directions, coordinate by coordinate."""
    outer = settings.outer and settings.outer.kind
    if settings.orthogonal is not None and (rule.dense or outer == "adam"):
        what = f"rule {settings.rule}" if rule.dense else "outer optimiser adam"
        raise ConfigError(
            f"aggregation.orthogonal needs a step that is a sum of updates, which {what} does not make: remove it or "
            "choose another"
        )


def find_rule(name: str) -> Rule:
    """Return the rule of this name.

    Raises:
        ConfigError: nobody registered it, or it is not a rule.
    """
    if name in RULES:
        return RULES[name]
    found = _registered().get(name)
    if found is None:
        known = ", ".join(sorted({*RULES, *_registered()}))
        raise ConfigError(
            f"aggregation.rule must be one of {known}, got {name!r}: fix the name or install the package that "
            f"registers it under {ENTRY_POINTS}"
        )
    try:
        loaded = found.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"aggregation.rule {name} ({found.value}) cannot be imported ({error}): fix the package"
        ) from error
    if not isinstance(loaded, Rule) and not callable(loaded):
        raise ConfigError(
            f"aggregation.rule {name} ({found.value}) is neither a function nor a Rule: fix the entry point"
        )
    return loaded if isinstance(loaded, Rule) else Rule(weights=loaded)


def origin(name: str) -> str:
    """Name the package and release that a user's rule comes from; empty for ours."""
    found = None if name in RULES else _registered().get(name)
    if found is None:
        return ""
    package = "unknown" if found.dist is None else f"{found.dist.name} {found.dist.version}"
    return f" {name}={found.value} ({package})"


@cache
def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _checked(rule: str, name: str, bound: Bound, value: Any) -> Any:
    if value is None and bound.default is None:
        return None
    kind = int if bound.whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not bound.least <= value <= bound.largest:
        what = "a whole number" if bound.whole else "a number"
        raise ConfigError(
            f"aggregation.rule_options.{name} of rule {rule} must be {what} in {bound.least:g}..{bound.largest:g}, "
            f"got {value!r}: fix the value"
        )
    return value

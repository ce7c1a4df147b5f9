"""Values that would end in a traceback, or switch a bound off, are refused when the file is read."""

from __future__ import annotations

import pytest

from fednested_lib.errors import ConfigError
from tests.federation import make_workspace
from tier1.config import load_tier1

INF = float("inf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evaluation.max_regression", INF),
        ("evaluation.max_regression", 101.0),
        ("window.max_wait_s", INF),
        ("window.max_wait_s", 1e300),
        ("log.timeout_s", float("nan")),
        ("rates.eta_t2", 1e200),
        ("aggregation.staleness_exponent", 2000.0),
        ("aggregation.max_norm", 1e300),
        ("aggregation.token_cap", 10**400),
        ("aggregation.min_mass_tokens", 10**400),
        ("core.seed", 1 << 64),
        ("model.seed", 1 << 64),
    ],
)
def test_a_value_out_of_bounds_is_named(tmp_path, key, value):
    """Infinite, absurd and overflowing numbers are one line with the key, not an error in the middle of a round."""
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=key):
        load_tier1(make_workspace(tmp_path, **{section: {name: value}}))

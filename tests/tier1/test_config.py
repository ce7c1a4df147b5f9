"""Values that would end in a traceback, or switch a bound off, are refused when the file is read."""

from __future__ import annotations

import pytest

from fednested_lib.errors import ConfigError
from tests.federation import make_workspace
from tier1.config import ScheduleConfig, load_tier1
from tier1.loops.core_update import _engine
from tier1.training.deepspeed_backend import DeepSpeedBackend

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


def test_the_engine_is_the_one_that_the_file_names(tmp_path):
    """Plain torch unless `core.deepspeed` is there; its stages and sizes are checked when the file is read."""
    assert _engine(load_tier1(make_workspace(tmp_path / "a")).core.deepspeed) is None
    chosen = {"zero_stage": 3, "expert_parallel": 2, "bf16": True}
    config = load_tier1(make_workspace(tmp_path / "b", core={"deepspeed": chosen}))
    assert isinstance(_engine(config.core.deepspeed), DeepSpeedBackend)
    assert config.core.deepspeed.model_dump() == chosen | {"offload": False}
    with pytest.raises(ConfigError, match=r"core\.deepspeed\.zero_stage"):
        load_tier1(make_workspace(tmp_path / "c", core={"deepspeed": {"zero_stage": 4}}))


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_a_schedule_that_was_written_is_read_again(kind):
    """Whoever writes a whole configuration, defaults and all, can read it."""
    written = ScheduleConfig(kind=kind)
    assert ScheduleConfig(**written.model_dump()) == written

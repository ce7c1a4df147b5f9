"""A training that does not fit is refused before it is loaded, by an estimate that grows with what it counts."""

from __future__ import annotations

import re

import pytest

from fednested_lib.errors import ConfigError
from fednested_lib.memory import estimate, require, resident_bytes
from fednested_lib.snapshot import SnapshotManifest, describe_config, expert_shapes

HOW = {"frozen": "fp32", "rank": 4, "n_adapted": {0: 6, 1: 6, 2: 6}, "tokens": 64, "process_bytes": 1_000_000}


@pytest.fixture
def manifest(make_model) -> SnapshotManifest:
    """The manifest of a tiny model; its blobs are nowhere."""
    config = describe_config(make_model("mixtral").config)
    return SnapshotManifest(version=0, family="mixtral", model_config=config, tokenizer="0" * 64, blobs={})


def test_model_and_adapters_are_counted_to_the_byte(make_model, family):
    """The fp32 model is the sum of its parameters, adapters five times their factors and a table of tokens."""
    model = make_model(family)
    manifest = SnapshotManifest(
        version=0, family=family, model_config=describe_config(model.config), tokenizer="0" * 64, blobs={}
    )
    shapes = expert_shapes(manifest)
    layers = sorted({int(name.split(".")[2]) for name in shapes})
    need = estimate(manifest, **{**HOW, "n_adapted": dict.fromkeys(layers, 2)})
    assert need.model == sum(each.numel() * 4 for each in model.parameters())
    factors = sum(2 * 4 * (d_out + d_in) * 4 for _, d_out, d_in in shapes.values())
    assert need.adapters == 5 * factors + 2 * len(layers) * model.config.vocab_size
    assert need.total == need.process + need.model + need.adapters + max(need.loading, need.step)


def test_less_is_less(manifest):
    """Smaller forms, micro-batches, ranks and fewer experts each need less."""
    need = estimate(manifest, **HOW)
    assert estimate(manifest, **{**HOW, "frozen": "int8"}).model < need.model
    assert estimate(manifest, **{**HOW, "frozen": "int4"}).model < estimate(manifest, **{**HOW, "frozen": "int8"}).model
    assert estimate(manifest, **{**HOW, "tokens": 16}).step == pytest.approx(need.step / 4)
    assert estimate(manifest, **{**HOW, "rank": 8}).adapters > need.adapters
    assert estimate(manifest, **{**HOW, "n_adapted": {0: 1}}).adapters < need.adapters
    assert resident_bytes() > 10_000_000


def test_refusal_names_need_bound_and_remedy(manifest):
    """One line with the limit, what is needed, its parts and every key that lowers it; what just fits passes."""
    need = estimate(manifest, **HOW)
    most = -(-need.total // 1_000_000)
    require(need, most, micro_batch_size=4, frozen="fp32")
    with pytest.raises(ConfigError) as caught:
        require(need, most - 1, micro_batch_size=4, frozen="fp32")
    message = str(caught.value)
    assert re.match(
        rf"training.memory_limit_mb = {most - 1}, training on this model takes about {most} \(process 1", message
    )
    for key in ("training.micro_batch_size (now 4)", "adapters.budget", "adapters.rank", "model.frozen (now fp32)"):
        assert key in message
    assert "\n" not in message
    with pytest.raises(ConfigError, match="(?!.*model.frozen)"):
        require(need, most - 1, micro_batch_size=4, frozen="int4")

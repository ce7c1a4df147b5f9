from __future__ import annotations

import pytest
from typer.testing import CliRunner

from fednested_lib.errors import ChainError, ConfigError
from tests.federation import Device, make_workspace
from tier1.commands import app
from tier1.federation import open_federation
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.evaluate_and_promote import settle_candidate


@pytest.fixture
def config(tmp_path):
    """The configuration of a federation with versions 0 to 3."""
    path = make_workspace(tmp_path)
    fed = open_federation(path)
    device = Device(fed, "ann")
    for _ in range(3):
        take_updates(fed)
        device.send()
        settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    assert fed.chain.state().head.version == 3
    return path


def run(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, ["replay", *arguments])
    if result.exception is not None:
        raise result.exception
    return [line.split(",")[0] for line in result.output.splitlines() if line.startswith("version")]


def test_replay_of_a_range(config):
    """--from and --to choose what is reported; each alone means to the end and from the beginning."""
    common = ("--config", str(config))
    assert run(*common, "--from", "1", "--to", "2") == ["version 1: identical", "version 2: identical"]
    assert run(*common, "--from", "3") == ["version 3: identical"]
    assert run(*common, "--to", "0") == ["version 0: identical"]
    assert run(*common, "--version", "2") == ["version 2: identical"]
    assert len(run(*common)) == 4


def test_range_that_does_not_exist_is_refused(config):
    """A range outside the chain, an empty one, and a version beside a range are one line each."""
    common = ("--config", str(config))
    for wrong in (("--from", "2", "--to", "1"), ("--to", "4"), ("--from", "-1")):
        with pytest.raises(ChainError, match=r"must be a range in 0\.\.3, got"):
            run(*common, *wrong)
    with pytest.raises(ConfigError, match="--version 2 and --from/--to exclude each other"):
        run(*common, "--version", "2", "--from", "1")

"""Where a task may find its federation: on a cluster only in a place that all pods share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from flytekit import FlyteContextManager
from flytekit.core.context_manager import ExecutionParameters
from flytekit.models.core.identifier import WorkflowExecutionIdentifier
from flytekit.types.file import FlyteFile

from fednested_lib.errors import ConfigError
from tasks.federation import opened
from tests.federation import make_workspace
from tier1.config import load_tier1


@contextmanager
def on_a_cluster() -> Iterator[None]:
    """What a pod's entry point sets up: an execution with a name of its own."""
    context = FlyteContextManager.current_context()
    builder = ExecutionParameters.new_builder(context.user_space_params)
    builder.execution_id = WorkflowExecutionIdentifier("fednested", "development", "abcdef")
    state = context.new_execution_state().with_params(user_space_params=builder.build())
    with FlyteContextManager.with_context(context.with_execution_state(state)):
        yield


def workspace(directory: Path, **keys: object) -> FlyteFile:
    path = make_workspace(directory)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))
    return FlyteFile(str(path))


def test_an_execution_on_a_cluster_refuses_a_home_of_its_pod(tmp_path: Path) -> None:
    """The chain would be gone with the pod: one line says what to mount and which key says so."""
    with on_a_cluster(), pytest.raises(ConfigError, match="home_is_shared: true"), opened(workspace(tmp_path)):
        pass


def test_a_volume_that_all_pods_share_is_taken_at_its_word(tmp_path: Path) -> None:
    """With the key, the path is used as it stands; a local run never asks for it."""
    home = tmp_path / "volume"
    with on_a_cluster(), opened(workspace(tmp_path / "a", home=str(home), home_is_shared=True)) as fed:
        assert fed.home == home
    with opened(workspace(tmp_path / "b")) as fed:
        assert fed.home == tmp_path / "b" / "home"


def test_a_shared_home_is_an_absolute_path(tmp_path: Path) -> None:
    """A relative one would mean a scratch directory in every pod."""
    with pytest.raises(ConfigError, match="home must be an absolute path"):
        load_tier1(workspace(tmp_path, home_is_shared=True).path)

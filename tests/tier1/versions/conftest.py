from __future__ import annotations

import pytest

from tests.tier1.versions.scene import Scene


@pytest.fixture
def scene(tmp_path) -> Scene:
    """A federation with four devices and version 0."""
    scene = Scene(tmp_path)
    scene.genesis()
    return scene

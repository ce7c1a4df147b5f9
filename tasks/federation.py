"""How a task reaches its federation: the one input that every task takes, and the opened federation behind it.

In a pod the file is downloaded first, so that relative paths in it would mean the pod's scratch directory: a
configuration for a cluster names absolute paths and URIs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flytekit.types.file import FlyteFile

if TYPE_CHECKING:
    from tier1.federation import Federation

ConfigFile = FlyteFile["yaml"]


@contextmanager
def opened(config: ConfigFile) -> Iterator["Federation"]:
    """Open the federation of a tier1.yaml, and let go of its connections afterwards."""
    from tier1.federation import open_federation

    federation = open_federation(config.download())
    try:
        yield federation
    finally:
        federation.close()

"""How a task reaches its federation: the one input that every task takes, and the opened federation behind it.

In a pod the file is downloaded first, so that relative paths in it would mean the pod's scratch directory: a
configuration for a cluster names absolute paths and URIs. The chain lies in a directory, and a directory of one pod is
gone with it: on a cluster the configuration has to say that `home` is a volume which all pods share.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flytekit import current_context
from flytekit.types.file import FlyteFile

from fednested_lib.errors import ConfigError

if TYPE_CHECKING:
    from tier1.federation import Federation

ConfigFile = FlyteFile["yaml"]


@contextmanager
def opened(config: ConfigFile) -> Iterator["Federation"]:
    """Open the federation of a tier1.yaml, and let go of its connections afterwards.

    Raises:
        ConfigError: the file is wrong, or names a home of this pod alone.
    """
    from tier1.federation import open_federation

    federation = open_federation(config.download())
    if _is_in_pod() and not federation.config.home_is_shared:
        raise ConfigError(
            f"home = {federation.home} is a directory of this pod alone, and gone with it: mount one volume there in "
            "every pod and set home_is_shared: true (docs/first-remote-run.md)"
        )
    try:
        yield federation
    finally:
        federation.close()


def _is_in_pod() -> bool:
    """Tell whether this is a task of a cluster's execution; a local run, and its Elastic ranks, have no name there."""
    return current_context().execution_id.name not in ("local", "")

"""The outer loop's second half: devices get the champion.

    W_device ← W_champion

A device downloads the blobs that it does not hold, when it likes, and trains on that frozen snapshot.
"""

from flytekit import workflow

from tasks.failures import broadcast_failed
from tasks.federation import ConfigFile
from tasks.publishing import publish
from tier1.loops.records import Published


@workflow(on_failure=broadcast_failed)
def broadcast(config: ConfigFile) -> Published:
    """W_device ← W_champion.

    Args:
        config: the federation's tier1.yaml.

    Returns:
        The published version and its size; version -1 when there is no champion yet.
    """
    return publish(config=config)

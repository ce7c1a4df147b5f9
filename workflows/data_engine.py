"""The data engine: what devices tell decides when a loop turns out of its turn.

    tasks.training ← findings(telemetry.edge)

The trigger launches what it asks for (`docs/data-engine.md`).
"""

from flytekit import workflow

from tasks.data_engine import turn_engine
from tasks.failures import data_engine_failed
from tasks.federation import ConfigFile
from tier1.loops.records import EngineReport


@workflow(on_failure=data_engine_failed)
def data_engine(config: ConfigFile) -> EngineReport:
    """tasks.training ← findings(telemetry.edge).

    Args:
        config: the federation's tier1.yaml.

    Returns:
        What was found and asked for.
    """
    return turn_engine(config=config)

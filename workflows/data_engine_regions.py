"""The data engine where devices are many: their telemetry is verified region by region, and one turn decides.

    plan_turn → hear_region for each region → collect_turn

Findings, budget and tasks are those of `data_engine`; a region that nobody could hear is heard by who collects.
"""

from functools import partial

from flytekit import workflow

from tasks.data_engine import collect_turn, hear_region, plan_turn
from tasks.failures import data_engine_regions_failed
from tasks.federation import ConfigFile
from tier1.loops.records import EngineReport
from workflows.side_by_side import side_by_side


@workflow(on_failure=data_engine_regions_failed)
def data_engine_regions(config: ConfigFile) -> EngineReport:
    """tasks.training ← findings(∪ telemetry.edge of each region).

    Args:
        config: the federation's tier1.yaml, whose devices name their regions.

    Returns:
        What was found and asked for.
    """
    turn, regions = plan_turn(config=config)
    heard = side_by_side(partial(hear_region, config=config, turn=turn), region=regions)
    return collect_turn(config=config, turn=turn, heard=heard)

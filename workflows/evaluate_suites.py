"""Before the outer loop, where suites are many: measure a candidate on all of them side by side.

    plan_suites → measure_suite for each suite → collect_suites

Nothing is decided here, and nothing passes for being missing: `evaluate_and_promote` finds what was measured, measures
the rest itself, and fails if it cannot.
"""

from functools import partial

from flytekit import map_task, workflow

from tasks.evaluation import collect_suites, measure_suite, plan_suites
from tasks.failures import evaluate_suites_failed
from tasks.federation import ConfigFile
from tasks.promotion import NEWEST
from tier1.loops.records import SuitesMeasured

AT_ONCE = 8
ENOUGH = 0.5  # of the suites; fewer is no help to the gate but a broken store, which a person should see
RETRIES = 5  # of each suite, on the map node; evictions are what many small pods meet


@workflow(on_failure=evaluate_suites_failed)
def evaluate_suites(config: ConfigFile, candidate: str = NEWEST) -> SuitesMeasured:
    """L_s(W) ← measured, for W_candidate and W_parent on every suite s.

    Args:
        config: the federation's tier1.yaml.
        candidate: digest of the candidate; empty means the newest unsettled one.

    Returns:
        The losses, and the suites whose measuring failed.
    """
    planned = plan_suites(config=config, candidate=candidate)
    measure = partial(measure_suite, config=config, candidate=planned.candidate)
    losses = map_task(measure, concurrency=AT_ONCE, min_success_ratio=ENOUGH)(suite=planned.suites)
    losses = losses.with_overrides(retries=RETRIES)
    return collect_suites(candidate=planned.candidate, suites=planned.suites, losses=losses)

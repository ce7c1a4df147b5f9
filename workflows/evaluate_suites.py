"""Before the outer loop, where suites are many: measure a candidate on all of them side by side.

    plan_suites → measure_suite for each suite → collect_suites

Nothing is decided here, and nothing passes for being missing: `evaluate_and_promote` finds what was measured, measures
the rest itself, and fails if it cannot.
"""

from functools import partial

from flytekit import workflow

from tasks.evaluation import collect_suites, measure_suite, plan_suites
from tasks.failures import evaluate_suites_failed
from tasks.federation import ConfigFile
from tasks.promotion import NEWEST
from tier1.loops.records import SuitesMeasured
from workflows.side_by_side import side_by_side


@workflow(on_failure=evaluate_suites_failed)
def evaluate_suites(config: ConfigFile, candidate: str = NEWEST) -> SuitesMeasured:
    """L_s(W) ← measured, for W_candidate and W_parent on every suite s.

    Args:
        config: the federation's tier1.yaml.
        candidate: digest of the candidate; empty means the newest unsettled one.

    Returns:
        The losses, and the suites whose measuring failed.
    """
    digest, suites = plan_suites(config=config, candidate=candidate)
    losses = side_by_side(partial(measure_suite, config=config, candidate=digest), suite=suites)
    return collect_suites(candidate=digest, suites=suites, losses=losses)

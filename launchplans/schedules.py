"""When the loops turn by themselves.

    fast      every ten minutes    devices' updates
    sensed    one always waiting   devices' updates, as soon as the window over them closes: in place of fast
    nightly   02:00 UTC            with a core update before them
    engine    every hour           telemetry: asks the trigger for rounds, is none itself

All others run a whole round, because a candidate that nobody settles advances no head. A turn is skipped while the
previous one still runs, waiting for devices or for SecOps included; so `sensed`, scheduled every minute, is always
running once.
The trigger launches `fast` and `nightly` for tasks (`services/trigger`): one policy bounds both kinds of launch.

Nothing is active after registration: `make activate` switches plans on. What the registering shell says goes into the
plans (docs/first-remote-run.md):

    FEDNESTED_CONFIG_URI        the tier1.yaml that every plan has as its fixed input
    FEDNESTED_REGIONS           eu,us: one set of plans per region, `nested_round_fast_eu` …, each with the URI's
                                {region} replaced; none: one set
    FEDNESTED_SERVICE_ACCOUNT   Kubernetes service account of the pods
    FEDNESTED_NOTIFY            who gets an e-mail when an execution fails, is aborted or timed out
"""

import os
from datetime import timedelta

from flytekit import ConcurrencyPolicy, CronSchedule, Email, FixedRate, Labels, LaunchPlan
from flytekit.core.workflow import WorkflowBase
from flytekit.models.concurrency import ConcurrencyLimitBehavior
from flytekit.models.core.execution import WorkflowExecutionPhase
from flytekit.models.schedule import Schedule
from flytekit.models.security import Identity, SecurityContext
from flytekit.types.file import FlyteFile

from workflows.data_engine import data_engine
from workflows.nested_round import nested_round
from workflows.sensed_round import sensed_round


def _words(variable: str) -> list[str]:
    return [word for word in os.environ.get(variable, "").replace(",", " ").split() if word]


# Read at import, against the house rule: registration imports this module, pods never do.
CONFIG = os.environ.get("FEDNESTED_CONFIG_URI", "s3://fednested/tier1.yaml")
REGIONS = _words("FEDNESTED_REGIONS")
RUN_AS = SecurityContext(run_as=Identity(k8s_service_account=os.environ.get("FEDNESTED_SERVICE_ACCOUNT", "fednested")))
NOTIFY = _words("FEDNESTED_NOTIFY")
ONE_AT_A_TIME = ConcurrencyPolicy(max_concurrency=1, behavior=ConcurrencyLimitBehavior.SKIP)
MAX_PARALLELISM = 4  # nodes of one round at a time; a round is nearly a chain
BAD_ENDS = [WorkflowExecutionPhase.FAILED, WorkflowExecutionPhase.ABORTED, WorkflowExecutionPhase.TIMED_OUT]

if REGIONS and "{region}" not in CONFIG:
    raise ValueError(
        f"FEDNESTED_CONFIG_URI must contain {{region}} with FEDNESTED_REGIONS={','.join(REGIONS)}, got {CONFIG}: every "
        "region has a tier1.yaml of its own, for example s3://fednested/{region}/tier1.yaml"
    )


def plan(workflow: WorkflowBase, name: str, loop: str, schedule: Schedule, region: str, **inputs: object) -> LaunchPlan:
    """Return a plan of one region as all are: one turn at a time, our service account, labels, people to notify."""
    labels = {"fednested-loop": loop} | ({"fednested-region": region} if region else {})
    return LaunchPlan.get_or_create(
        workflow,
        name=f"{name}_{region}" if region else name,
        schedule=schedule,
        fixed_inputs={"config": FlyteFile(CONFIG.replace("{region}", region)), **inputs},
        concurrency=ONE_AT_A_TIME,
        labels=Labels(labels),
        max_parallelism=MAX_PARALLELISM,
        security_context=RUN_AS,
        notifications=[Email(phases=BAD_ENDS, recipients_email=NOTIFY)] if NOTIFY else None,
    )


def _plans(region: str) -> list[LaunchPlan]:
    minutes, night = timedelta(minutes=1), CronSchedule(schedule="0 2 * * *")
    asks = {"channel": "console"}
    return [
        plan(nested_round, "nested_round_fast", "fast", FixedRate(10 * minutes), region, core=False, **asks),
        plan(sensed_round, "sensed_round", "sensed", FixedRate(minutes), region, **asks),
        plan(nested_round, "nested_round_nightly", "nightly", night, region, core=True, **asks),
        plan(data_engine, "data_engine_hourly", "data-engine", FixedRate(60 * minutes), region),
    ]


PLANS = [plan for region in REGIONS or [""] for plan in _plans(region)]

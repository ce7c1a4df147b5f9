"""When the loops turn by themselves.

    fast      every ten minutes    devices' updates
    sensed    one always waiting   devices' updates, as soon as the window over them closes: in place of fast
    nightly   02:00 UTC            with a core update before them
    engine    every hour           telemetry: asks the trigger for rounds, is none itself

All others run a whole round, because a candidate that nobody settles advances no head. A turn is skipped while the
previous one still runs, waiting for devices or for SecOps included; so `sensed`, scheduled every minute, is always
running once.
The trigger launches `fast` and `nightly` for tasks (`services/trigger`): one policy bounds both kinds of launch.

Nothing is active after registration: switch a plan on with `pyflyte launchplan nested_round_fast VERSION --activate`.
"""

import os
from datetime import timedelta

from flytekit import ConcurrencyPolicy, CronSchedule, FixedRate, Labels, LaunchPlan
from flytekit.models.concurrency import ConcurrencyLimitBehavior
from flytekit.types.file import FlyteFile

from workflows.data_engine import data_engine
from workflows.nested_round import nested_round
from workflows.sensed_round import sensed_round

# Read at import, against the house rule: registration imports this module, pods never do.
CONFIG = os.environ.get("FEDNESTED_CONFIG_URI", "s3://fednested/tier1.yaml")
ONE_AT_A_TIME = ConcurrencyPolicy(max_concurrency=1, behavior=ConcurrencyLimitBehavior.SKIP)
MAX_PARALLELISM = 4  # nodes of one round at a time; a round is nearly a chain

fast = LaunchPlan.get_or_create(
    nested_round,
    name="nested_round_fast",
    schedule=FixedRate(duration=timedelta(minutes=10)),
    fixed_inputs={"config": FlyteFile(CONFIG), "core": False, "channel": "console"},
    concurrency=ONE_AT_A_TIME,
    labels=Labels({"fednested-loop": "fast"}),
    max_parallelism=MAX_PARALLELISM,
)
sensed = LaunchPlan.get_or_create(
    sensed_round,
    name="sensed_round",
    schedule=FixedRate(duration=timedelta(minutes=1)),
    fixed_inputs={"config": FlyteFile(CONFIG), "channel": "console"},
    concurrency=ONE_AT_A_TIME,
    labels=Labels({"fednested-loop": "sensed"}),
    max_parallelism=MAX_PARALLELISM,
)
nightly = LaunchPlan.get_or_create(
    nested_round,
    name="nested_round_nightly",
    schedule=CronSchedule(schedule="0 2 * * *"),
    fixed_inputs={"config": FlyteFile(CONFIG), "core": True, "channel": "console"},
    concurrency=ONE_AT_A_TIME,
    labels=Labels({"fednested-loop": "nightly"}),
    max_parallelism=MAX_PARALLELISM,
)
engine = LaunchPlan.get_or_create(
    data_engine,
    name="data_engine_hourly",
    schedule=FixedRate(duration=timedelta(hours=1)),
    fixed_inputs={"config": FlyteFile(CONFIG)},
    concurrency=ONE_AT_A_TIME,
    labels=Labels({"fednested-loop": "data-engine"}),
    max_parallelism=MAX_PARALLELISM,
)

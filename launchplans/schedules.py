"""When the loops turn by themselves.

    fast      every ten minutes   devices' updates
    nightly   02:00 UTC           with a core update before them

Both run `nested_round`, because a candidate that nobody settles advances no head. A turn is skipped while the previous
one still runs, waiting for SecOps included. Nothing is active after registration: switch a plan on with
`pyflyte launchplan nested_round_fast VERSION --activate`.
"""

import os
from datetime import timedelta

from flytekit import ConcurrencyPolicy, CronSchedule, FixedRate, LaunchPlan
from flytekit.models.concurrency import ConcurrencyLimitBehavior
from flytekit.types.file import FlyteFile

from workflows.nested_round import nested_round

# Read at import, against the house rule: registration imports this module, pods never do.
CONFIG = os.environ.get("FEDNESTED_CONFIG_URI", "s3://fednested/tier1.yaml")
ONE_AT_A_TIME = ConcurrencyPolicy(max_concurrency=1, behavior=ConcurrencyLimitBehavior.SKIP)

fast = LaunchPlan.get_or_create(
    nested_round,
    name="nested_round_fast",
    schedule=FixedRate(duration=timedelta(minutes=10)),
    fixed_inputs={"config": FlyteFile(CONFIG), "core": False, "channel": "console"},
    concurrency=ONE_AT_A_TIME,
)
nightly = LaunchPlan.get_or_create(
    nested_round,
    name="nested_round_nightly",
    schedule=CronSchedule(schedule="0 2 * * *"),
    fixed_inputs={"config": FlyteFile(CONFIG), "core": True, "channel": "console"},
    concurrency=ONE_AT_A_TIME,
)

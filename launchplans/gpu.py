"""When the core is trained on GPUs: every night, in place of `schedules.nightly`, which trains it in one CPU pod.

It ends at the automatic gate: the devices' updates fold onto its head, and the next round's decision covers both. A
module of its own, because only a host with torch can register it.
"""

from flytekit import CronSchedule, Labels, LaunchPlan
from flytekit.types.file import FlyteFile

from launchplans.schedules import CONFIG, MAX_PARALLELISM, ONE_AT_A_TIME
from workflows.core_update_elastic import settled_core_update_8_gpu

nightly_gpu = LaunchPlan.get_or_create(
    settled_core_update_8_gpu,
    name="core_update_8_gpu_nightly",
    schedule=CronSchedule(schedule="0 0 * * *"),
    fixed_inputs={"config": FlyteFile(CONFIG), "run": ""},
    concurrency=ONE_AT_A_TIME,
    labels=Labels({"fednested-loop": "nightly-gpu"}),
    max_parallelism=MAX_PARALLELISM,
)

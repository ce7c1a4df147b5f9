"""When the core is trained on GPUs: every night, in place of `schedules.nightly`, which trains it in one CPU pod.

It ends at the automatic gate: the devices' updates fold onto its head, and the next round's decision covers both. A
module of its own, because only a host with torch can register it.
"""

from flytekit import CronSchedule

from launchplans.schedules import REGIONS, plan
from workflows.core_update_elastic import settled_core_update_8_gpu

MIDNIGHT = CronSchedule(schedule="0 0 * * *")
PLANS = [
    plan(settled_core_update_8_gpu, "core_update_8_gpu_nightly", "nightly-gpu", MIDNIGHT, region, run="")
    for region in REGIONS or [""]
]

"""The campaign of kills as figures: one campaign per process, read by every row.

Its training, gate and approval are stand-ins (`kills_roles.py`): an approval goes past policy, checklist and registry.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from benchmarks.kills import FAILPOINTS, Campaign, run_campaign
from benchmarks.registry import Reading, figure


@cache
def campaign(kills: int = 200, updates: int = 300) -> Campaign:
    """Run a campaign once and print it, its seed included."""
    with tempfile.TemporaryDirectory() as directory:
        found = run_campaign(Path(directory), kills=kills, updates=updates)
    print(found)
    return found


@figure("campaign.kills", unit="1", bound=">= 200", cls="long")
def campaign_kills() -> float:
    """SIGKILLs between durable steps of device, aggregator, committer; training, gate and approval are stand-ins."""
    return len(campaign().kills)


@figure("campaign.failpoints", unit="%", bound="== 100", cls="long")
def campaign_failpoints() -> float:
    """Failpoints the campaign's three roles can pass, not policy, registry or log loss, at which a process died."""
    return 100 * (1 - len(campaign().missed) / sum(map(len, FAILPOINTS.values())))


@figure("campaign.updates", unit="1", bound=">= 300", cls="long")
def campaign_updates() -> float:
    """Updates that the devices of the campaign made and sent while they and tier 1 were being killed."""
    return campaign().updates


@figure("campaign.exactly_once", unit="%", bound="== 100", cls="long")
def campaign_exactly_once() -> float:
    """Sequence numbers of the campaign that are in the chain exactly once, all receipts received."""
    return campaign().exactly_once


@figure("campaign.replayed", unit="%", bound="== 100", cls="long")
def campaign_replayed() -> float:
    """Versions of the campaign that replay from genesis rebuilds to their digests."""
    return campaign().replayed


@figure("campaign.recovery", unit="s", bound="<= 5", cls="long")
def campaign_recovery() -> Reading:
    """Longest time from starting a killed process again, imports included, until its interrupted piece is done."""
    times = [each for recoveries in campaign().recoveries.values() for each in recoveries]
    return Reading(value=max(times), low=min(times), high=max(times))


@figure("campaign.sample", unit="%", bound="== 100", cls="full")
def campaign_sample() -> float:
    """A campaign of 20 kills in small: sequence numbers in the chain exactly once, or versions replayed, the lesser."""
    found = campaign(kills=20, updates=30)
    return min(found.exactly_once, found.replayed)

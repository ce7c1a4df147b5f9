"""Tasks of a fold on several machines; the middle one is mapped over the shards of the experts."""

from datetime import timedelta
from functools import partial
from typing import NamedTuple

from flytekit import Resources, task

from images import specs
from tasks.decks import show
from tasks.errors import retry_recoverable
from tasks.federation import ConfigFile, opened
from tier1.loops.records import CandidateRef, CutRef, ShardFolded

folding = partial(
    task, container_image=specs.tier1, requests=Resources(cpu="2", mem="8Gi"), retries=3, timeout=timedelta(hours=1)
)


class Plan(NamedTuple):
    """A planned fold and its shards; outputs of their own, because Flyte maps over no list inside a dataclass."""

    plan: str
    shards: list[int]


@folding()
@retry_recoverable
def plan_fold(config: ConfigFile, cut: CutRef, shards: int) -> Plan:
    """Verify and weigh the updates of the cut, and say which shards of the experts they move."""
    from tier1.loops import aggregate_sharded

    with opened(config) as fed:
        return Plan(*aggregate_sharded.plan_fold(fed, cut, shards))


@folding()
@retry_recoverable
def fold_shard(shard: int, config: ConfigFile, plan: str) -> ShardFolded:
    """Fold one shard of the experts into the store; a shard that is there already is not folded again."""
    from tier1.loops import aggregate_sharded

    with opened(config) as fed:
        return aggregate_sharded.fold_shard(fed, plan, shard)


@folding(enable_deck=True, deck_fields=())
@retry_recoverable
def collect_fold(config: ConfigFile, cut: CutRef, plan: str, folded: list[ShardFolded | None]) -> CandidateRef:
    """Make the candidate of all shards, fold those that failed; the deck names who contributed."""
    from tier1.loops import aggregate_sharded
    from tier1.loops.reports import contributors_html

    with opened(config) as fed:
        candidate = aggregate_sharded.collect_fold(fed, cut, plan, folded)
        show("Contributors", contributors_html(fed, candidate))
        return candidate

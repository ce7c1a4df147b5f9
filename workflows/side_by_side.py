"""One task over many items at once: with what, how often again, and how many must succeed, said once for all maps.

The retries stand on the map node, for propeller does not read those of a mapped task. Who collects gets None for an
item that failed, and does or names what is missing; so half is enough, and fewer is a broken store, broker or image,
which a person should see.
"""

from functools import partial

from flytekit import map_task
from flytekit.core.promise import Promise

AT_ONCE = 8
ENOUGH = 0.5  # of the items
RETRIES = 5  # of each item; evictions are what many small pods meet


def side_by_side(task: partial, **items: list) -> list:
    """Map a task, everything but its first parameter bound, over the items of that parameter.

    On Flyte 2 the results are values, which take no overrides; there items go by position, hence the first parameter.
    """
    results = map_task(task, concurrency=AT_ONCE, min_success_ratio=ENOUGH)(**items)
    return results.with_overrides(retries=RETRIES) if isinstance(results, Promise) else results

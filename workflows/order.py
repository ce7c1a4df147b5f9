"""One after the other, where nothing is passed on."""

from itertools import pairwise

from flytekit.core.promise import Promise, VoidPromise


def in_order(*results: object) -> None:
    """Let each node begin when the one before it has ended.

    Flyte 1's `a >> b`; on Flyte 2 a workflow runs as it is written and its results are values, which have no `>>`.
    """
    for before, after in pairwise(results):
        if isinstance(before, Promise | VoidPromise):
            before >> after

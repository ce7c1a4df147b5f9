"""The RPCs that the scenarios used are those that `docs/remote-proof.md` lists; `WRITE_RPCS=1 make e2e` writes them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.flyte.stand_in.server import FlyteStandIn

PAGE = Path(__file__).resolve().parents[2] / "docs/remote-proof.md"
SCENARIOS = {"test_faults.py", "test_loops.py", "test_refusals.py"}
LIST = re.compile(r"(?<=<!-- rpcs -->\n\n).*?(?=\n\n<!-- /rpcs -->)", re.DOTALL)


def test_every_task_with_a_deck_has_shown_one(request: pytest.FixtureRequest, flyte: FlyteStandIn) -> None:
    """Each deck that any workflow promises was written in some scenario, and judged there (`Site.check_decks`)."""
    if {item.path.name for item in request.session.items} >= SCENARIOS:
        assert flyte.decks == flyte.catalog.with_decks()


def test_the_list_of_rpcs_is_complete(request: pytest.FixtureRequest, flyte: FlyteStandIn) -> None:
    """What a Flyte must serve for us is a list that a reader can hold against their own."""
    used = "\n".join(f"- `{name}`" for name in sorted(flyte.rpcs))
    page = PAGE.read_text(encoding="utf-8")
    if os.environ.get("WRITE_RPCS"):
        PAGE.write_text(LIST.sub(used, page), encoding="utf-8")
        return
    listed = set(LIST.search(page)[0].splitlines())
    assert set(used.splitlines()) <= listed, f"WRITE_RPCS=1 make e2e: {set(used.splitlines()) - listed}"
    if {item.path.name for item in request.session.items} >= SCENARIOS:
        assert listed == set(used.splitlines()), "no scenario uses the others any more: WRITE_RPCS=1 make e2e"

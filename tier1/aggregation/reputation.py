"""Reputation: how far a client is trusted, from its rows in the versions that lead to the parent and nothing else.

    score  = (1 + min(0, cos)) · min(1, 2·median distance / distance)        of one accepted update, in [0, 1]
    rate   = (n_accepted + n_0) / (n_accepted + n_blamed + n_0)
    trust  = max(floor, rate · (Σ score + n_0·newcomer) / (n_accepted + n_0))

`cos` and `distance` compare an update, clipped, with the aggregate it went into; both are in its manifest row. Updates
that point away from everybody or lie far outside lose trust; honest ones that only differ do not, and who was never
seen has `newcomer`. A pure function of manifests, so replay finds the same.

Only refusals that the client's own key is answerable for count: who may write to the topic may forge a name, repeat a
record, or put other bytes under a signed envelope, and must not be able to spoil somebody's name with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tier1.versions.manifest import Accepted
    from tier1.versions.settings import ReputationSettings
    from tier1.versions.state import VersionView

# Reasons that prove nothing about the client that a record names.
NOT_ITS_FAULT = frozenset(
    {"bad_envelope", "unknown_client", "wrong_key_epoch", "bad_update_id", "bad_signature", "duplicate", "too_stale"}
    | {"foreign_federation"}  # signed, but copied from another log for all we know
    | {"payload_missing", "payload_unreadable", "payload_digest", "payload_size", "parser_error"}
)


def trusts(parent: VersionView, clients: Sequence[str], settings: ReputationSettings) -> dict[str, float]:
    """Return client id → trust in [floor, 1].

    Args:
        parent: the version that is folded into; it and those before it are the history.
        clients: whom to judge.
        settings: window, pseudo count, score of newcomers, floor.
    """
    scores: dict[str, list[float]] = {client: [] for client in clients}
    blamed = dict.fromkeys(clients, 0)
    for view in islice(parent.lineage(), settings.window):
        for row, score in _scores(view.accepted):
            if row.client_id in scores:
                scores[row.client_id].append(score)
        for record in view.refused:
            if record.client_id in blamed and record.reason not in NOT_ITS_FAULT:
                blamed[record.client_id] += 1
    return {client: _trust(scores[client], blamed[client], settings) for client in scores}


def _scores(rows: Sequence[Accepted]) -> list[tuple[Accepted, float]]:
    """Return every row with its score; a row that was not measured has 1."""
    distances = [row.distance for row in rows if row.distance is not None]
    usual = median(distances) if distances else 0.0
    return [(row, _score(row, usual)) for row in rows]


def _score(row: Accepted, usual: float) -> float:
    if row.cosine is None or row.distance is None:
        return 1.0
    nearness = 1.0 if row.distance <= 2 * usual else 2 * usual / row.distance
    return (1.0 + min(0.0, row.cosine)) * nearness


def _trust(scores: Sequence[float], n_blamed: int, settings: ReputationSettings) -> float:
    seen = len(scores) + settings.pseudo_count
    rate = seen / (seen + n_blamed)
    return max(settings.floor, rate * (sum(scores) + settings.pseudo_count * settings.newcomer) / seen)

"""What one step of a loop hands to the next: small, frozen, typed; bytes stay in the stores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainingGrant:
    """The policy allowed this run to train on these datasets."""

    decision_id: str
    datasets: list[str]


@dataclass(frozen=True, kw_only=True)
class PackedData:
    """Packed tokens of the governed datasets: int32 [n_rows, seq_len + 1] under `path`."""

    digest: str
    path: str
    n_rows: int
    n_tokens: int
    n_set_aside: int


@dataclass(frozen=True, kw_only=True)
class DenseRef:
    """The dense delta of one training run, published on `updates.tier1`."""

    update_id: str
    run_id: str
    base_version: int


@dataclass(frozen=True, kw_only=True)
class CutRef:
    """A cut of `updates.experts.local`, stored at `path`; `n_records` 0 means nothing arrived in time."""

    path: str
    n_records: int
    topic: str


@dataclass(frozen=True, kw_only=True)
class CandidateRef:
    """A folded candidate; an empty digest means that there was nothing to fold."""

    digest: str
    parent_version: int
    n_accepted: int
    n_refused: int


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What became of a candidate: `head` (entry `manifest`, number `version`), `rejected` or `nothing`."""

    status: str
    version: int
    manifest: str
    candidate: str
    tries: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was decided; `champion` is the version now.

    The verdict is `approved`, `rejected`, `gate_rejected`, `blocked` or `nothing`.
    """

    verdict: str
    version: int
    champion: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """The champion as devices can fetch it; `version` -1 means that there is no champion yet."""

    version: int
    snapshot: str
    n_blobs: int
    n_bytes: int

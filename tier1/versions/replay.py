"""Replay: rebuild any version from genesis and the archived inputs, and compare it blob by blob.

    version_n = F(… F(F(genesis, inputs_1), inputs_2) …, inputs_n)

Nothing but genesis's blobs, the chain and the archive is read. With the code and on the numeric profile that the
manifest records, every blob must come out with the recorded digest: `identical`, or `differs` and the slice is named.
With other code or on another profile blobs that differ are compared with the originals, if there are any: `equivalent`
with the largest difference. Evidence that does not hold (an altered envelope, payload, delta slice or entry) stops the
replay and is named.

`verify_log` compares every cut with the log as long as its retention lasts; `verify_blobs` re-reads the stored weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ChainCorrupt, ChainError, ContractError, SnapshotError
from fednested_lib.log import UpdateLog
from fednested_lib.snapshot import decode_blob
from tier1.aggregation.fold import numeric_profile
from tier1.versions.admission import Admission, Device
from tier1.versions.archive import restore
from tier1.versions.build import fold_candidate
from tier1.versions.chain import Chain
from tier1.versions.cut import read_cut
from tier1.versions.dense_update import verify_dense
from tier1.versions.manifest import Accepted, Candidate, Cut, LogAccepted
from tier1.versions.state import ChainState, Sealed, VersionView, history_of

Verdict = Literal["identical", "equivalent", "differs"]
TOLERANCE = 1e-5  # largest |difference| / largest |weight| of a slice that counts as equivalent


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What the replay of one version found.

    Args:
        version: its number.
        verdict: `identical`, `equivalent` (other code or numeric profile, small difference) or `differs`.
        n_blobs: slices compared.
        n_folded: slices that this version made.
        where: first slice or manifest row that differs; None when identical.
        largest_difference: relative to the largest weight of its slice; None when it cannot be measured.
    """

    version: int
    verdict: Verdict
    n_blobs: int
    n_folded: int
    where: str | None = None
    largest_difference: float | None = None


@dataclass(frozen=True, kw_only=True)
class LogCheck:
    """Whether the log still holds what an entry consumed: `same`, `expired` by retention, or `replaced`.

    Replaced: an operator accepted the log without these records, or another log; they are in the archive alone.
    """

    entry: str
    status: Literal["same", "expired", "replaced"]
    n_records: int


@dataclass(frozen=True, kw_only=True)
class BlobProblem:
    """One stored blob that is missing or corrupt."""

    version: int
    key: str
    message: str


def replay(
    chain: Chain,
    versions: Iterable[int] | None = None,
    *,
    archive: BlobStore,
    genesis: BlobStore,
    target: BlobStore,
    originals: BlobStore | None = None,
    devices: Mapping[str, Device] | None = None,
) -> Iterator[Replayed]:
    """Rebuild versions and compare them with the chain.

    Args:
        chain: the entries; verified on the way.
        versions: numbers to report; None means all. Versions they are built on are rebuilt too.
        archive: accepted inputs.
        genesis: holds the blobs of version 0.
        target: receives every rebuilt blob; may be empty.
        originals: where blobs of another numeric profile may be found for comparison.
        devices: registered devices; an update of a device whose epoch is registered must carry that key.

    Yields:
        One result per version asked for, in order of version.

    Raises:
        ChainCorrupt: an entry, envelope, payload or delta slice was altered, or a signature does not hold; named.
        ChainError: the chain has no such version.
        SnapshotError: a blob of genesis is missing or corrupt.
    """
    state, entries = chain.state(), chain.entries()
    wanted = set(state.versions) if versions is None else set(versions)
    unknown = sorted(wanted - set(state.versions))
    if unknown:
        raise ChainError(f"version must be one of 0..{max(state.versions)}, got {unknown[0]}")
    needed = {view.version for version in wanted for view in state.versions[version].lineage()}
    rebuilt: dict[int, VersionView] = {}
    for version in sorted(needed):
        view = state.versions[version]
        if version == 0:
            result = _restore_genesis(view, genesis, target)
            rebuilt[0] = view
        else:
            result, rebuilt[version] = _rebuild(
                entries[view.seq], view, rebuilt, archive, target, originals, devices or {}, chain.trusted
            )
        if version in wanted:
            yield result


def verify_log(chain: Chain, log: UpdateLog) -> list[LogCheck]:
    """Read every cut again and compare it with its entry, as far as the log's retention reaches.

    Raises:
        LogError: the log is another one, or its records are not those that were consumed.
        ChainCorrupt: a record is not the one that its manifest row names.
    """
    checks, entries = [], chain.entries()
    accepted = [sealed.entry.body for sealed in entries if isinstance(sealed.entry.body, LogAccepted)]
    for sealed in _folds(entries):
        cut = sealed.entry.body.candidate.inputs.cut
        if cut is None:
            continue
        if _given_up(cut, accepted):
            checks.append(LogCheck(entry=sealed.name, status="replaced", n_records=cut.n_records))
            continue
        lows = {str(partition): low for partition, (low, _) in log.watermarks(cut.topic).items()}
        if any(start < end and start < lows.get(partition, 0) for partition, (start, end) in cut.ranges.items()):
            checks.append(LogCheck(entry=sealed.name, status="expired", n_records=cut.n_records))
            continue
        found = {(record.partition, record.offset): record.digest for record in read_cut(log, cut)}
        candidate = sealed.entry.body.candidate
        for row in (*candidate.accepted, *candidate.refused):
            if found.get((row.partition, row.offset)) != row.record_sha256:
                raise ChainCorrupt(
                    f"record {cut.topic}[{row.partition}] offset {row.offset} is not the one that {sealed.name} names: "
                    "restore the log or the entry"
                )
        checks.append(LogCheck(entry=sealed.name, status="same", n_records=cut.n_records))
    return checks


def _given_up(cut: Cut, accepted: Sequence[LogAccepted]) -> bool:
    """Tell whether the log no longer answers for a cut: an operator accepted another one, or this one without it."""
    return any(
        later.generation > cut.generation
        and (
            later.log_id != cut.log_id
            or any(start < end > later.offsets.get(partition, 0) for partition, (start, end) in cut.ranges.items())
        )
        for later in accepted
    )


def verify_archive(chain: Chain, archive: BlobStore) -> int:
    """Check every archived input of the chain, those of rejections included; return how many.

    Raises:
        ChainCorrupt: an envelope, payload or delta slice was altered or is missing; named.
    """
    n = 0
    for sealed in _folds(chain.entries()):
        n += sum(1 for _ in _evidence(sealed, archive, {}, chain.trusted))
    return n


def verify_blobs(state: ChainState, blobs: BlobStore) -> list[BlobProblem]:
    """Read every blob that a version names and return those that are missing or corrupt."""
    problems, checked = [], set()
    for view in state.versions.values():
        outer = {f"outer/{key}": digest for key, digest in view.outer.items()}
        fisher = {f"fisher/{key}": digest for key, digest in view.fisher.items()}
        for key, digest in {**view.blobs, **outer, **fisher, "tokenizer": view.tokenizer}.items():
            if digest in checked:
                continue
            checked.add(digest)
            try:
                blobs.get(digest)
            except SnapshotError as error:
                problems.append(BlobProblem(version=view.version, key=key, message=str(error)))
    return problems


def _folds(entries: Iterable[Sealed]) -> Iterator[Sealed]:
    return (sealed for sealed in entries if sealed.entry.body.kind in ("version", "rejection"))


def _restore_genesis(view: VersionView, genesis: BlobStore, target: BlobStore) -> Replayed:
    for key, digest in {**view.blobs, "tokenizer": view.tokenizer}.items():
        try:
            target.put(genesis.get(digest))
        except SnapshotError as error:
            raise SnapshotError(error.reason, f"slice {key} of version 0: {error}") from error
    return Replayed(version=0, verdict="identical", n_blobs=len(view.blobs), n_folded=0)


def _rebuild(
    sealed: Sealed,
    view: VersionView,
    rebuilt: Mapping[int, VersionView],
    archive: BlobStore,
    target: BlobStore,
    originals: BlobStore | None,
    devices: Mapping[str, Device],
    trusted: Mapping[str, str],
) -> tuple[Replayed, VersionView]:
    recorded: Candidate = sealed.entry.body.candidate
    parent = rebuilt[recorded.parent_version]
    updates = tuple(restored for restored in _evidence(sealed, archive, devices, trusted) if restored is not None)
    made = fold_candidate(
        parent,
        recorded.inputs,
        Admission(updates=updates, refused=tuple(recorded.refused)),
        rates=recorded.rates,
        settings=recorded.settings,
        blobs=target,
        archive=archive,
        trainer=recorded.trainer,
        authorisation=recorded.authorisation,
        lineage=recorded.lineage,
    )
    n_folded = sum(parent.blobs.get(key) != digest for key, digest in made.blobs.items())
    common = {"version": view.version, "n_blobs": len(recorded.blobs), "n_folded": n_folded}
    rebuilt_view = replace(view, parent=parent, blobs=made.blobs, **history_of(made))
    return _compare(recorded, made, target, originals, common), rebuilt_view


def _evidence(sealed: Sealed, archive: BlobStore, devices: Mapping[str, Device], trusted: Mapping[str, str]):
    """Yield every archived input of an entry after checking it: updates of a cut, None per slice of a dense delta."""
    candidate = sealed.entry.body.candidate
    try:
        for accepted in candidate.accepted:
            _check_key(accepted, devices)
            yield restore(accepted, archive)
        for dense in candidate.inputs.round:
            verify_dense(dense, trusted)
            for digest in (*dense.blobs.values(), *dense.fisher.values()):
                archive.get(digest)
                yield None
    except (ContractError, ChainCorrupt) as error:
        raise ChainCorrupt(f"{sealed.entry.body.kind} entry {sealed.name}: {error}") from error


def _check_key(accepted: Accepted, devices: Mapping[str, Device]) -> None:
    device = devices.get(accepted.client_id)
    if device is not None and device.key_epoch == accepted.key_epoch and device.public_key != accepted.public_key:
        raise ChainCorrupt(
            f"update {accepted.update_id[:12]} carries key {accepted.public_key[:12]}, but the registered key of "
            f"{accepted.client_id} in epoch {device.key_epoch} is {device.public_key[:12]}"
        )


def _compare(
    recorded: Candidate, made: Candidate, target: BlobStore, originals: BlobStore | None, common: dict
) -> Replayed:
    said, found = _digests(recorded), _digests(made)
    different = sorted(key for key in {*said, *found} if said.get(key) != found.get(key))
    exact = recorded.profile == numeric_profile() and recorded.code_version == made.code_version
    if not different:
        row = _different_row(recorded, made, exact=exact)
        return Replayed(verdict="differs" if row else "identical", where=row, **common)
    largest = None
    if originals is not None and set(said) == set(found):
        largest = max(_difference(said[key], found[key], target, originals) for key in different)
    close = not exact and largest is not None and largest <= TOLERANCE
    return Replayed(
        verdict="equivalent" if close else "differs", where=different[0], largest_difference=largest, **common
    )


def _digests(candidate: Candidate) -> dict[str, str]:
    """Return every blob that a fold made or kept: weights, the outer optimiser's state, Fisher information."""
    outer = {f"outer/{key}": digest for key, digest in candidate.outer.items()}
    return {**candidate.blobs, **outer, **{f"fisher/{key}": digest for key, digest in candidate.fisher.items()}}


def _different_row(recorded: Candidate, made: Candidate, *, exact: bool) -> str | None:
    """Name the first accepted update whose recorded weight is not what F gives."""
    for said, found in zip(recorded.accepted, made.accepted, strict=True):
        if said != found and (exact or not _close(said, found)):
            return f"accepted update {said.update_id[:12]} of {said.client_id}"
    return None


def _close(said: Accepted, found: Accepted) -> bool:
    """Tell whether two rows differ in the rounding of measured numbers alone."""
    pairs = [(getattr(said, name), getattr(found, name)) for name in Accepted.model_fields]
    return all(
        math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        if isinstance(one, float) and isinstance(other, float)
        else one == other
        for one, other in pairs
    )


def _difference(recorded: str, made: str, target: BlobStore, originals: BlobStore) -> float:
    before, after = decode_blob(originals.get(recorded)), decode_blob(target.get(made))
    if {name: array.shape for name, array in before.items()} != {name: array.shape for name, array in after.items()}:
        return float("inf")
    scale = max(float(np.abs(array).max()) for array in before.values())
    return max(float(np.abs(before[name] - after[name]).max()) for name in before) / max(scale, 1e-30)

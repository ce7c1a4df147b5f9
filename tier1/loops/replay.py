"""What anybody may ask of a finished federation: rebuild it, audit it, list it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import ChainCorrupt, ChainError, SnapshotError
from tier1.evaluation.utilisation import ExpertUse
from tier1.federation import Federation
from tier1.loops.anchors import check_end
from tier1.loops.gate_candidate import kept_use
from tier1.loops.reports import find_candidate
from tier1.versions.audit import AuditRow, audit, rows_of
from tier1.versions.candidates import snapshot_of
from tier1.versions.manifest import LogAccepted, Rejection, SuiteChange, Version
from tier1.versions.new_log import lost_text
from tier1.versions.replay import replay, verify_archive, verify_blobs, verify_log


def replay_versions(fed: Federation, first: int | None = None, last: int | None = None) -> Iterator[str]:
    """Rebuild versions from genesis and the archived inputs and compare every blob; one line each.

    Blobs of the store that are missing or corrupt are put back from what was rebuilt to the same digest.

    Args:
        fed: the federation.
        first: the oldest version to report; None is genesis.
        last: the newest; None is the newest there is.

    Raises:
        ChainCorrupt: a rebuilt blob differs, or evidence does not hold; named.
        ChainError: the chain does not have these versions.
    """
    wanted = _range(fed, first, last)
    yield from check_end(fed)
    scratch = fed.home / "replay"
    target = BlobStore(scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        results = replay(
            fed.chain,
            wanted,
            archive=fed.archive,
            genesis=fed.blobs,
            target=target,
            originals=fed.blobs,
            devices=fed.config.devices,
        )
        for result in results:
            line = (
                f"version {result.version}: {result.verdict}, "
                f"{result.n_blobs} blobs, {result.n_folded} of them made by this version"
            )
            if result.verdict == "differs":
                raise ChainCorrupt(
                    f"{line}; first difference at {result.where}: the manifest or the code is not the one that made it"
                )
            if result.largest_difference is not None:
                line = f"{line}, largest difference {result.largest_difference:.2e}"
            restored = _restore(fed, result.version, target) if result.verdict == "identical" else 0
            yield f"{line}, {restored} missing or corrupt ones restored" if restored else line
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _range(fed: Federation, first: int | None, last: int | None) -> list[int] | None:
    if first is None and last is None:
        return None
    newest = max(fed.chain.state().versions)
    first, last = first or 0, newest if last is None else last
    if not 0 <= first <= last <= newest:
        raise ChainError(f"versions to replay must be a range in 0..{newest}, got {first}..{last}")
    return list(range(first, last + 1))


def _restore(fed: Federation, version: int, rebuilt: BlobStore) -> int:
    """Put back the stored blobs of a version that are missing or corrupt; return how many."""
    view, restored = fed.chain.state().versions[version], 0
    for digest in {*view.blobs.values(), *view.outer.values(), *view.fisher.values()}:
        try:
            fed.blobs.get(digest)
        except SnapshotError:
            fed.blobs.put(rebuilt.get(digest))
            restored += 1
    return restored


def verify_all(fed: Federation) -> Iterator[str]:
    """Re-read everything that is stored: chain, anchor, archive, log and weights; one line per part.

    Raises:
        FednestedError: the first thing that does not hold, named.
    """
    yield f"chain: {len(fed.chain.entries())} entries, signatures and links hold"
    yield from check_end(fed)
    yield f"archive: {verify_archive(fed.chain, fed.archive)} archived inputs (envelopes, payloads, delta slices) hold"
    checks = verify_log(fed.chain, fed.log)
    count = Counter(check.status for check in checks)
    yield (
        f"log: {count['same']} of {len(checks)} cuts are still there and unchanged, {count['expired']} expired, "
        f"{count['replaced']} of a log that was given up"
    )
    problems = verify_blobs(fed.chain.state(), fed.blobs)
    if problems:
        first = problems[0]
        raise ChainCorrupt(f"weights of version {first.version}, slice {first.key}: {first.message}")
    yield f"weights: every blob of {len(fed.chain.state().versions)} versions holds"


def audit_version(fed: Federation, version: int) -> Iterator[str]:
    """Say who contributed what with which weight, and what was refused why."""
    found = audit(fed.chain, version)
    parent = "none" if found.parent_version is None else f"version {found.parent_version}"
    yield f"version {version}  manifest {found.manifest}  parent {parent}  {', '.join(found.standing) or 'waiting'}"
    yield f"made by {found.trainer} at {found.created_at}; tries: {', '.join(found.tries) or 'none'}"
    yield from map(_audit_line, found.rows)


def audit_candidate(fed: Federation, digest: str) -> Iterator[str]:
    """Say the same of a candidate, settled or not, and how each suite changed where a gate has evaluated it.

    Raises:
        ChainError: neither disk nor chain has it.
    """
    candidate = find_candidate(fed, digest)
    if candidate is None:
        raise ChainError(
            f"candidate {digest} is neither on disk nor in the chain: a deck names it whole, 64 hex digits, or give "
            "--version"
        )
    yield f"candidate {digest}  parent version {candidate.parent_version}  made by {candidate.trainer}"
    bodies = (sealed.entry.body for sealed in fed.chain.entries())
    tries = (one for body in bodies if isinstance(body, Version | Rejection) for one in body.tries)
    for gate in (one.gate for one in tries if one.candidate == digest and one.gate is not None):
        yield from map(_suite_line, gate.rows)
    yield from map(_use_line, kept_use(fed, snapshot_of(candidate)))
    yield from map(_audit_line, rows_of(candidate))


def _suite_line(row: SuiteChange) -> str:
    verdict = "ok" if row.passed else "failed"
    spread = (
        "" if row.change_interval is None else f"  change {row.change_interval[0]:+.4f}..{row.change_interval[1]:+.4f}"
    )
    shares = {"accuracy": row.accuracy, "completions": row.completions}
    known = "".join(f"  {name} {share:.4f}" for name, share in shares.items() if share is not None)
    lines = f"  most from line {', '.join(map(str, row.worst_lines))}" if row.worst_lines else ""
    losses = f"before {row.before}  after {row.after}  bound {row.bound:g}  {verdict}"
    return f"  suite     {row.suite}  {losses}{spread}{known}{lines}"


def _use_line(use: ExpertUse) -> str:
    shares = "  ".join(f"{suite} {share:.4f}" for suite, share in use.shares.items())
    standing = ", ".join(use.standing) or "-"
    return f"  expert    {use.name}  load {use.load:.3f}  specialisation {use.specialisation:.3f}  {standing}  {shares}"


def _audit_line(row: AuditRow) -> str:
    if row.kind == "refused":
        return f"  refused   {row.source}  {row.reason}: {row.detail}"
    if row.kind == "dense":
        return f"  dense     {row.source}  {row.who}  base v{row.base_version}  tokens {row.tokens}"
    return (
        f"  accepted  {row.source}  {row.who} #{row.sequence}  "
        f"base v{row.base_version}  staleness {row.staleness}  tokens {row.tokens}  "
        f"norm {row.norm:.4f}  clip {row.clip:.3f}  weight {row.weight:.5f}{_standing(row)}"
    )


def _standing(row: AuditRow) -> str:
    """Say how an update stands to the others, where that was recorded."""
    found = {"trust": row.trust, "cosine": row.cosine, "distance": row.distance}
    return "".join(f"  {name} {value:.3f}" for name, value in found.items() if value is not None)


def chain_lines(fed: Federation) -> Iterator[str]:
    """List versions with what became of them, oldest first."""
    state = fed.chain.state()
    yield (
        f"head version {state.head.version}  champion version {state.champion.version}  "
        f"entries {state.next_seq}  chain {state.digest}"
    )
    for number in sorted(state.versions):
        found = audit(fed.chain, number)
        accepted = sum(row.kind == "accepted" for row in found.rows)
        refused = sum(row.kind == "refused" for row in found.rows)
        parent = "-" if found.parent_version is None else f"v{found.parent_version}"
        standing = ", ".join(found.standing) or "waiting"
        yield f"  v{number}  parent {parent}  accepted {accepted}  refused {refused}  {standing}"
    for sealed in fed.chain.entries():
        if isinstance(sealed.entry.body, LogAccepted):
            yield _log_line(sealed.entry.body)


def _log_line(body: LogAccepted) -> str:
    return (
        f"  log {body.generation} accepted by {body.operator} at {body.created_at}: {body.reason} "
        f"(no longer in the log: {lost_text(body)})"
    )

"""The outer loop's first half: measure a candidate and its parent on every suite, and judge the difference."""

from __future__ import annotations

from dataclasses import replace

from fednested_lib.errors import ConfigError, DataError
from fednested_lib.snapshot import SnapshotManifest
from tier1.evaluation.gate import Bound, GateRow, judge
from tier1.evaluation.suites import Suite, SuiteRegistry, SuiteResult
from tier1.evaluation.utilisation import ExpertUse, expert_use
from tier1.federation import Federation
from tier1.versions.candidates import snapshot_of
from tier1.versions.manifest import Candidate, GateRecord, SuiteChange
from tier1.versions.state import VersionView


def gate_candidate(fed: Federation, candidate: Candidate) -> GateRecord:
    """Evaluate a candidate and its parent on every suite and judge the difference: the automatic gate.

    Raises:
        DataError: a suite that the gate before judged is no longer registered, was altered, or is unusable.
        SnapshotError: a blob is missing or corrupt.
    """
    _require_suites_of_before(fed)
    parent = fed.chain.state().versions[candidate.parent_version]
    after = snapshot_of(candidate)
    default, bounds = _bounds(fed)
    report = judge(measure(fed, parent.snapshot), measure(fed, after), default=default, bounds=bounds)
    digests = suite_registry(fed).digests()
    rows = [_suite_change(row, digests[row.suite]) for row in report.rows]
    return GateRecord(candidate=candidate.digest(), passed=report.passed, reason=report.reason, rows=rows)


def _require_suites_of_before(fed: Federation) -> None:
    """Let no suite leave the gate or change: the registry is a directory, the gate's records are signed."""
    records = (one.gate for sealed in reversed(fed.chain.entries()) for one in getattr(sealed.entry.body, "tries", []))
    before = next((record for record in records if record), None)
    registered = suite_registry(fed).digests()
    for row in before.rows if before else ():
        entry = fed.home / "suites" / f"{row.suite}.json"
        if row.suite not in registered:
            raise DataError(
                f"suite {row.suite!r} was judged by the gate before and is not registered any more: restore "
                f"{entry} and the file that it names, or give its text under evaluation.suites"
            )
        if row.suite_digest not in (None, registered[row.suite]):
            raise DataError(
                f"suite {row.suite!r} was judged by the gate with digest {row.suite_digest[:12]}, {entry} has "
                f"{registered[row.suite][:12]}: restore that file; other text needs another name"
            )


def _bounds(fed: Federation) -> tuple[Bound, dict[str, Bound]]:
    """Return the default bound and those of suites that have their own."""
    settings = fed.config.evaluation
    default = Bound(max_regression=settings.max_regression, judged_by=settings.judged_by)
    given = {
        name: {key: value for key, value in own.model_dump().items() if value is not None}
        for name, own in settings.bounds.items()
    }
    return default, {name: replace(default, **own) for name, own in given.items()}


def _suite_change(row: GateRow, digest: str) -> SuiteChange:
    accuracy, completions = row.accuracy, row.completions
    return SuiteChange(
        suite=row.suite,
        suite_digest=digest,
        before=row.before,
        after=row.after,
        bound=row.bound,
        passed=row.passed,
        judged_by=row.judged_by,
        after_interval=row.after_interval,
        change_interval=row.change_interval,
        accuracy=accuracy and accuracy.value,
        accuracy_interval=accuracy and accuracy.interval,
        completions=completions and completions.value,
        completions_interval=completions and completions.interval,
        worst_lines=row.worst_lines,
    )


def measure(
    fed: Federation, snapshot: SnapshotManifest, suites: dict[str, Suite] | None = None
) -> dict[str, SuiteResult]:
    """Measure a snapshot on some suites; on every suite that was ever registered, if they are not named."""
    from tier1.evaluation.measured import measure_snapshot

    settings = fed.config.evaluation
    return measure_snapshot(
        snapshot,
        registered_suites(fed) if suites is None else suites,
        fed.blobs,
        seq_len=settings.seq_len,
        max_tokens=settings.max_tokens,
        reports=fed.home / "reports",
    )


def kept_use(fed: Federation, snapshot: SnapshotManifest) -> list[ExpertUse]:
    """Return how a snapshot's experts are used, from the measurements that are kept; empty if there are none."""
    from tier1.evaluation.measured import kept

    settings = fed.config.evaluation
    found = kept(
        snapshot,
        SuiteRegistry(fed.home / "suites").digests(),
        seq_len=settings.seq_len,
        max_tokens=settings.max_tokens,
        reports=fed.home / "reports",
    )
    return expert_use({name: result.routed for name, result in found.items()})


def registered_suites(fed: Federation) -> dict[str, Suite]:
    """Return every suite that was ever registered, those of the configuration included."""
    return suite_registry(fed).suites()


def suite_registry(fed: Federation) -> SuiteRegistry:
    """Return the register of suites, those of the configuration included.

    Raises:
        ConfigError: a suite was registered with other content, or a bound is for a suite that nobody registered.
    """
    registry = SuiteRegistry(fed.home / "suites")
    registry.register(fed.config.evaluation.suites)
    if unknown := sorted(set(fed.config.evaluation.bounds) - set(registry.names())):
        raise ConfigError(
            f"evaluation.bounds names suite {unknown[0]!r}, registered are {', '.join(registry.names())}: "
            "fix the name or register the suite under evaluation.suites"
        )
    return registry


def losses_of(fed: Federation, view: VersionView) -> dict[str, float]:
    """Return the loss per suite of a version, nats per token."""
    return {name: result.nats_per_token for name, result in measure(fed, view.snapshot).items()}

"""Views of the chain, repaired after every entry: quarantine topic, settled updates, registry aliases, lineage.

None of them is ever read to decide anything, and each can be made again from the chain; so they are written after the
entry, and a crash or a dead server between leaves only a view that the next call repairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import structlog

from fednested_lib.blobs import write_durable
from fednested_lib.errors import TransportError
from fednested_lib.events import MAX_SETTLED, ResendUnsettled, UpdatesSettled
from fednested_lib.failpoints import failpoint
from tier1.federation import Federation
from tier1.governance.approvals import DecisionInput
from tier1.governance.ports import AccessDecision, ModelVersion, Registered, RegistryState
from tier1.governance.registry import repair_from_chain
from tier1.loops.run_metrics import show_runs
from tier1.versions.manifest import Candidate, Genesis, LogAccepted, Rejection, Version
from tier1.versions.state import ChainState, Sealed

log = structlog.get_logger()
# Refusals whose update id proves nothing: it is not the content's, not its device's, or another federation's.
UNPROVEN = frozenset({"bad_update_id", "bad_signature", "foreign_federation"})


def sync_views(fed: Federation) -> None:
    """Bring every view up to date with the chain.

    Raises:
        TransportError: a server does not answer; the chain is unharmed, the next call repairs.
    """
    entries: list[Sealed] = []
    while len(entries) < len(entries := fed.chain.entries()):  # another committer may append meanwhile
        publish_outcomes(fed)
        repair_from_chain(fed.registry, lambda: registry_state(fed))
        _record_versions(fed, entries)
    show_runs(fed)


def publish_outcomes(fed: Federation) -> None:
    """Bring the views on the log up to date: refused records in quarantine, devices told what is settled or lost.

    Raises:
        TransportError: the log does not answer; the next call repairs.
    """
    entries = fed.chain.entries()
    _publish_quarantine(fed, entries)
    _publish_settled(fed, entries)
    _ask_again(fed, entries)


def registry_state(fed: Federation) -> RegistryState:
    """Return what the registry should show."""
    state = fed.chain.state()
    head, champion = state.head, state.champion
    return RegistryState(
        candidate=head.version if head.version > champion.version else None,
        champion=champion.version if champion.version in state.approved else None,
        manifests={number: view.digest for number, view in state.versions.items()},
        entries=[sealed.digest for sealed in fed.chain.entries()],
        load=lambda number: _model_version(fed, state, number),
    )


def _model_version(fed: Federation, state: ChainState, number: int) -> ModelVersion:
    from tier1.evaluation.metrics import metrics_of
    from tier1.loops.gate_candidate import measure

    view = state.versions[number]
    measured = measure(fed, view.snapshot)
    sealed = fed.chain.entries()[view.seq]
    body = sealed.entry.body
    return ModelVersion(
        version=number,
        manifest=sealed.entry.to_bytes(),
        snapshot=view.snapshot.to_json(),
        weights_digest=view.base_digest,
        chain_head=state.digest,
        policy_decision=None if isinstance(body, Genesis) else body.candidate.authorisation,
        losses={suite: result.nats_per_token for suite, result in measured.items()},
        metrics=metrics_of(measured),
    )


def _publish_quarantine(fed: Federation, entries: list[Sealed]) -> None:
    """Publish the refused records of entries that were not published yet; at least once, keyed by place."""
    from tier1.versions.quarantine import publish_refused

    def publish(_sealed: Sealed, candidate: Candidate) -> None:
        if candidate.refused:
            publish_refused(candidate.refused, candidate.inputs.cut, fed.log)

    _for_new_cuts(fed, entries, "quarantined", publish)


def _publish_settled(fed: Federation, entries: list[Sealed]) -> None:
    """Tell devices which updates the entries consumed that were not told yet; at least once, and twice is harmless."""
    federation = fed.chain.state().federation

    def publish(sealed: Sealed, candidate: Candidate) -> None:
        ids = list(settled_ids(candidate))
        for start in range(0, len(ids), MAX_SETTLED):
            event = UpdatesSettled(
                federation=federation, chain_seq=sealed.entry.seq, update_ids=ids[start : start + MAX_SETTLED]
            )
            fed.announce(event, key=b"settled")
            failpoint("settled.after_publish")
        log.info("updates.settled", seq=sealed.entry.seq, updates=len(ids))

    _for_new_cuts(fed, entries, "settled", publish)


def _ask_again(fed: Federation, entries: list[Sealed]) -> None:
    """Ask devices to send again what is not settled, for the newest log that an operator accepted; at least once."""
    accepted = [sealed.entry.seq for sealed in entries if isinstance(sealed.entry.body, LogAccepted)]
    mark = fed.home / "asked-again"
    if not accepted or (mark.exists() and int(mark.read_text()) >= accepted[-1]):
        return
    event = ResendUnsettled(federation=fed.chain.state().federation, chain_seq=accepted[-1])
    fed.announce(event, key=b"resend")
    failpoint("resend.after_publish")
    write_durable(mark, str(accepted[-1]).encode())


def settled_ids(candidate: Candidate) -> Iterator[str]:
    """Yield the ids of the updates that a candidate consumed, accepted or refused; each once."""
    refused = (row.update_id for row in candidate.refused if row.reason not in UNPROVEN)
    yield from dict.fromkeys(each for each in (*(row.update_id for row in candidate.accepted), *refused) if each)


def _for_new_cuts(
    fed: Federation, entries: list[Sealed], view: str, publish: Callable[[Sealed, Candidate], None]
) -> None:
    """Call `publish` for each entry that consumed a cut and lies behind the view's mark, then move the mark."""
    mark = fed.home / view
    published = int(mark.read_text()) if mark.exists() else -1
    for sealed in entries[published + 1 :]:
        body = sealed.entry.body
        if isinstance(body, Version | Rejection) and body.candidate.inputs.cut:
            publish(sealed, body.candidate)
    if entries and entries[-1].entry.seq != published:
        write_durable(mark, str(entries[-1].entry.seq).encode())


def _record_versions(fed: Federation, entries: list[Sealed]) -> None:
    """Link each version of the chain to its registry entry in the lineage outbox, once."""
    from tier1.governance.lineage import MadeVersion, version_event
    from tier1.loops.gate_candidate import losses_of

    state = fed.chain.state()
    missing = [
        s for s in entries if isinstance(s.entry.body, Version) and not fed.lineage.has(manifest_digest=s.digest)
    ]
    registered = {entry.manifest_digest: entry for entry in fed.registry.versions()} if missing else {}
    for sealed in missing:
        body = sealed.entry.body
        made = MadeVersion(
            model_name=fed.config.registry.model_name,
            registered=registered[sealed.digest],
            version=body.version,
            manifest_digest=sealed.digest,
            run_id=run_of(body),
            principal=body.candidate.trainer,
            losses=losses_of(fed, state.versions[body.version]),
            made_ms=_now_ms(),
        )
        fed.lineage.record(version_event(made))


def run_of(body: Version) -> str:
    """Return the lineage name of the run that made a version."""
    inputs = body.candidate.inputs
    return inputs.dense.update_id if inputs.dense and not inputs.others else inputs.id()


def record_promotion(fed: Federation, number: int, decision: DecisionInput, access: AccessDecision) -> tuple[str, ...]:
    """Write the lineage of a decision to the outbox and return its ids."""
    from tier1.governance.lineage import promotion_event

    view = fed.chain.state().versions[number]
    registered, previous = _registered(fed, view.digest)
    event = promotion_event(
        model_name=fed.config.registry.model_name,
        version=number,
        run_id=run_of(fed.chain.entries()[view.seq].entry.body),
        decision=decision,
        access=access,
        registered=registered,
        previous=previous,
        decided_ms=_now_ms(),
    )
    return fed.lineage.record(event)


def _registered(fed: Federation, manifest: str) -> tuple[Registered | None, Registered | None]:
    """Return a version's registry entry and the champion's; none while the registry cannot be reached."""
    try:
        known = {entry.manifest_digest: entry for entry in fed.registry.versions()}
        return known.get(manifest), fed.registry.get("champion")
    except TransportError as error:
        log.warning("registry.unreachable", reason=str(error))
        return None, None


def _now_ms() -> int:
    return int(time.time() * 1000)

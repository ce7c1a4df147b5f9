"""Decks: what SecOps reads before deciding. Small HTML tables, no JavaScript, nothing from the network."""

from __future__ import annotations

from html import escape

from fednested_lib.errors import ChainError
from tier1.federation import Federation
from tier1.loops.records import CandidateRef, Published, Settled
from tier1.versions.candidates import load_candidate
from tier1.versions.manifest import Candidate, GateRecord, Try, Version

MAX_ROWS = 300


def evaluation_html(fed: Federation, settled: Settled) -> str:
    """Return the regression table of the last try: loss per domain before and after, bound, verdict."""
    tries = _tries(fed, settled)
    if not tries or tries[-1].gate is None:
        return f"<p>{escape(settled.reason) or 'Nothing was evaluated.'}</p>"
    return gate_html(tries, tries[-1].gate) + _against_champion(fed, settled)


def gate_html(tries: list[Try], gate: GateRecord) -> str:
    """Return the table of one gate's record; every name is escaped."""
    rows = "".join(
        f"<tr><td>{escape(row.suite)}</td><td>{_number(row.before)}</td><td>{_number(row.after)}</td>"
        f"<td>{_change(row.before, row.after)}</td><td>{row.bound:g}</td>"
        f"<td>{'ok' if row.passed else '<strong>failed</strong>'}</td></tr>"
        for row in gate.rows[:MAX_ROWS]
    )
    verdict = "passed" if gate.passed else "failed"
    return (
        f"<h3>Automatic gate {verdict} after {len(tries)} tries</h3>"
        f"<p>{escape(gate.reason)}. Losses are nats per token on held-out text.</p>"
        f"<table><tr><th>suite</th><th>before</th><th>after</th><th>change</th><th>bound</th><th></th></tr>{rows}</table>"
        f"<p>{escape(_try_text(tries))}</p>"
    )


def _against_champion(fed: Federation, settled: Settled) -> str:
    """Return the change since the champion: several versions may have passed their gates since, each a little worse."""
    state = fed.chain.state()
    if settled.status != "head" or state.champion.version in (0, settled.version):
        return ""
    before, after = (_losses(fed, manifest) for manifest in (state.champion.digest, settled.manifest))
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{_number(before.get(name))}</td><td>{_number(loss)}</td>"
        f"<td>{_change(before.get(name), loss)}</td></tr>"
        for name, loss in sorted(after.items())[:MAX_ROWS]
    )
    return (
        f"<h3>Since the champion, version {state.champion.version}</h3>"
        f"<table><tr><th>suite</th><th>champion</th><th>this version</th><th>change</th></tr>{rows}</table>"
    )


def _losses(fed: Federation, manifest: str) -> dict[str, float | None]:
    """Return the losses that the gate of a version recorded; the deck measures nothing, its image has no torch."""
    sealed = next(sealed for sealed in fed.chain.entries() if sealed.digest == manifest)
    gate = sealed.entry.body.tries[-1].gate
    return {row.suite: row.after for row in gate.rows} if gate else {}


def contributors_html(fed: Federation, made: Settled | CandidateRef) -> str:
    """Return who contributed what with which weight, and what was refused why."""
    candidate = _candidate(fed, made)
    if candidate is None:
        return "<p>Nothing was folded.</p>"
    if candidate.inputs.dense:
        dense = candidate.inputs.dense
        return (
            f"<p>Core update of run {escape(dense.run_id)} by {escape(dense.trainer)}: "
            f"{dense.steps} steps, {dense.tokens} tokens, from version {dense.base_version}.</p>"
        )
    accepted = "".join(
        f"<tr><td>{escape(row.client_id)}</td><td>{row.sequence}</td><td>v{row.base_version}</td>"
        f"<td>{row.staleness}</td><td>{row.tokens}</td><td>{row.norm:.3f}</td><td>{row.clip:.3f}</td>"
        f"<td>{row.weight:.4f}</td><td>{_number(row.trust)}</td><td>{_number(row.cosine)}</td>"
        f"<td>{_number(row.distance)}</td><td>{row.payload_bytes}</td></tr>"
        for row in candidate.accepted[:MAX_ROWS]
    )
    refused = "".join(
        f"<tr><td>{row.partition}@{row.offset}</td><td>{escape(row.client_id or '?')}</td>"
        f"<td>{escape(row.reason)}</td><td>{escape(row.detail)}</td></tr>"
        for row in candidate.refused[:MAX_ROWS]
    )
    counts = f"<h3>{len(candidate.accepted)} accepted, {len(candidate.refused)} refused</h3>"
    columns = ("client", "sequence", "base", "staleness", "tokens", "norm", "clip", "weight")
    columns += ("trust", "cosine", "distance", "bytes")
    text = f"{counts}<table>{_head(columns)}{accepted}</table>"
    if refused:
        text += f"<table>{_head(('record', 'client', 'reason', 'detail'))}{refused}</table>"
    return text


def published_html(published: Published) -> str:
    """Return one sentence about what devices can fetch."""
    if published.version < 0:
        return "<p>There is no champion yet: nothing was published.</p>"
    return (
        f"<p>Version {published.version}: {published.n_blobs} blobs, {published.n_bytes / 1e6:.1f} MB, "
        f"manifest {published.snapshot}.</p>"
    )


def _tries(fed: Federation, settled: Settled) -> list[Try]:
    for sealed in fed.chain.entries() if settled.manifest else []:
        if sealed.digest == settled.manifest:
            return list(sealed.entry.body.tries)
    return []


def _candidate(fed: Federation, made: Settled | CandidateRef) -> Candidate | None:
    digest = made.candidate if isinstance(made, Settled) else made.digest
    if not digest:
        return None
    try:
        return load_candidate(fed.home, digest)
    except ChainError:
        bodies = (sealed.entry.body for sealed in fed.chain.entries())
        candidates = (body.candidate for body in bodies if isinstance(body, Version))
        return next((candidate for candidate in candidates if candidate.digest() == digest), None)


def _try_text(tries: list[Try]) -> str:
    steps = [
        f"η_core {t.rates.eta_core:g}, η_T1 {t.rates.eta_t1:g}, η_T2 {t.rates.eta_t2:g}: {t.outcome.replace('_', ' ')}"
        for t in tries
    ]
    return "Tries: " + "; ".join(steps)


def _head(columns: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<th>{column}</th>" for column in columns) + "</tr>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _change(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{after - before:+.4f}"

"""Decks: what SecOps reads before deciding. Small HTML tables, no JavaScript, nothing from the network.

A table ends at its share of `PAGE_BYTES`, with a line that says how many rows are left out and which command prints
all: nobody reads a page of 3 MB for 10,000 updates, and Flyte's console loads it whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import TypeVar
from urllib.parse import quote

from fednested_lib.errors import ChainError
from tier1.federation import Federation
from tier1.loops.records import CandidateRef, Published, Settled
from tier1.versions.candidates import load_candidate
from tier1.versions.manifest import Accepted, Candidate, GateRecord, Refused, Rejection, SuiteChange, Try, Version

PAGE_BYTES = 100_000  # of a task's decks together, Flyte's page of 4 kB included
TABLE_BYTES = PAGE_BYTES // 7  # five tables at most, and what stands around them
MAX_TEXT = 1_000
ACCEPTED = ("client", "sequence", "base", "staleness", "tokens", "norm", "clip", "weight")
ACCEPTED += ("trust", "cosine", "distance", "bytes")
T = TypeVar("T")


def evaluation_html(fed: Federation, settled: Settled) -> str:
    """Return the regression table of the last try: loss per domain before and after, bound, verdict; and where to look.

    At most 40 kB.
    """
    tries = _tries(fed, settled)
    if not tries or tries[-1].gate is None:
        return f"<p>{_short(settled.reason) or 'Nothing was evaluated.'}</p>"
    return gate_html(tries, tries[-1].gate) + _against_champion(fed, settled) + _links(fed, settled)


def gate_html(tries: list[Try], gate: GateRecord) -> str:
    """Return the table of one gate's record, what failed first; every name is escaped."""
    verdict = "passed" if gate.passed else "failed"
    rows = sorted(gate.rows, key=lambda row: row.passed)
    table = _table(("suite", "before", "after", "change", "bound", "verdict"), rows, _suite_cells, gate.candidate)
    return (
        f"<h3>Automatic gate {verdict} after {len(tries)} tries</h3>"
        f"<p>{_short(gate.reason)}. Losses are nats per token on held-out text.</p>{table}"
        f"<p>{_short(_try_text(tries))}</p>"
    )


def _suite_cells(row: SuiteChange) -> tuple[str, ...]:
    verdict = "ok" if row.passed else "failed"
    change = _change(row.before, row.after)
    return row.suite, _number(row.before), _number(row.after), change, f"{row.bound:g}", verdict


def _against_champion(fed: Federation, settled: Settled) -> str:
    """Return the change since the champion: several versions may have passed their gates since, each a little worse."""
    state = fed.chain.state()
    if settled.status != "head" or state.champion.version in (0, settled.version):
        return ""
    before, after = (_losses(fed, manifest) for manifest in (state.champion.digest, settled.manifest))

    def cells(row: tuple[str, float | None]) -> tuple[str, ...]:
        name, loss = row
        return name, _number(before.get(name)), _number(loss), _change(before.get(name), loss)

    table = _table(("suite", "champion", "this version", "change"), sorted(after.items()), cells, settled.candidate)
    return f"<h3>Since the champion, version {state.champion.version}</h3>{table}"


def _links(fed: Federation, settled: Settled) -> str:
    """Return where registry and lineage have this entry: a link where there is a server, else the file."""
    settings = fed.config.registry
    registry = f"<code>{escape(str(fed.home / 'registry.json'))}</code>"
    if settings.uri.startswith(("http://", "https://")):
        page = f"{settings.uri.rstrip('/')}/#/models/{quote(settings.model_name, safe='')}"
        registry = f'<a href="{escape(page)}">{escape(settings.model_name)}</a>'
    return (
        f"<p>Registry: {registry}. Lineage: <code>{escape(str(fed.home / 'lineage.jsonl'))}</code>, lines with "
        f"manifest_digest {escape(settled.manifest)}.</p>"
    )


def _losses(fed: Federation, manifest: str) -> dict[str, float | None]:
    """Return the losses that the gate of a version recorded; the deck measures nothing, its image has no torch."""
    sealed = next(sealed for sealed in fed.chain.entries() if sealed.digest == manifest)
    gate = sealed.entry.body.tries[-1].gate
    return {row.suite: row.after for row in gate.rows} if gate else {}


def contributors_html(fed: Federation, made: Settled | CandidateRef) -> str:
    """Return who contributed what with which weight, and what was refused why; at most 50 kB."""
    digest = made.candidate if isinstance(made, Settled) else made.digest
    candidate = find_candidate(fed, digest)
    if candidate is None:
        return "<p>Nothing was folded.</p>"
    if candidate.inputs.dense:
        return "".join(
            f"<p>Core update of run {escape(dense.run_id)} by {escape(dense.trainer)}: "
            f"{dense.steps} steps, {dense.tokens} tokens, from version {dense.base_version}.</p>"
            for dense in candidate.inputs.round
        )
    reasons = Counter(row.reason for row in candidate.refused).most_common()
    text = f"<h3>{len(candidate.accepted)} accepted, {len(candidate.refused)} refused</h3>"
    text += _table(ACCEPTED, candidate.accepted, _accepted_cells, digest)
    if reasons:
        text += _table(("refused for", "updates"), reasons, lambda row: (row[0], str(row[1])), digest)
        text += _table(("record", "client", "reason", "detail"), candidate.refused, _refused_cells, digest)
    return text


def _accepted_cells(row: Accepted) -> tuple[str, ...]:
    numbers = (row.sequence, f"v{row.base_version}", row.staleness, row.tokens, f"{row.norm:.3f}", f"{row.clip:.3f}")
    stands = (f"{row.weight:.4f}", _number(row.trust), _number(row.cosine), _number(row.distance), row.payload_bytes)
    return row.client_id, *map(str, numbers), *map(str, stands)


def _refused_cells(row: Refused) -> tuple[str, ...]:
    return f"{row.partition}@{row.offset}", row.client_id or "?", row.reason, row.detail


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


def find_candidate(fed: Federation, digest: str) -> Candidate | None:
    """Return a candidate from the disk, else from the chain; None if neither has it."""
    if not digest:
        return None
    try:
        return load_candidate(fed.home, digest)
    except ChainError:
        bodies = (sealed.entry.body for sealed in fed.chain.entries())
        candidates = (body.candidate for body in bodies if isinstance(body, Version | Rejection))
        return next((candidate for candidate in candidates if candidate.digest() == digest), None)


def _try_text(tries: list[Try]) -> str:
    steps = [
        f"η_core {t.rates.eta_core:g}, η_T1 {t.rates.eta_t1:g}, η_T2 {t.rates.eta_t2:g}: {t.outcome.replace('_', ' ')}"
        for t in tries
    ]
    return "Tries: " + "; ".join(steps)


def _table(columns: Sequence[str], items: Sequence[T], cells: Callable[[T], tuple[str, ...]], candidate: str) -> str:
    """Return a table of as many items as its share of the page holds; every cell is escaped."""
    lines, size = [], 0
    for item in items:
        line = "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(item)) + "</tr>"
        size += len(line.encode())
        if size > TABLE_BYTES:
            break
        lines.append(line)
    head = "<tr>" + "".join(f"<th>{column}</th>" for column in columns) + "</tr>"
    table = f"<table>{head}{''.join(lines)}</table>"
    if rest := len(items) - len(lines):
        command = f"fednested tier1 audit --config tier1.yaml --candidate {candidate}"
        table += f"<p>{rest} of {len(items)} rows are left out; all of them: <code>{command}</code></p>"
    return table


def _short(text: str) -> str:
    return escape(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _change(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{after - before:+.4f}"

"""Decks: what SecOps reads before deciding. Small HTML tables, no JavaScript, nothing from the network.

A table ends at its share of `PAGE_BYTES`, with a line that says how many rows are left out and which command prints
all: nobody reads a page of 3 MB for 10,000 updates, and Flyte's console loads it whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import TypeVar
from urllib.parse import quote

from fednested_lib.errors import ChainError
from tier1.evaluation.utilisation import DEAD, OVERLOADED, SPECIALISED, STANDINGS, ExpertUse
from tier1.federation import Federation
from tier1.loops.gate_candidate import kept_use
from tier1.loops.records import CandidateRef, Published, Settled
from tier1.versions.candidates import load_candidate, snapshot_of
from tier1.versions.manifest import Accepted, Candidate, GateRecord, Refused, Rejection, SuiteChange, Try, Version

PAGE_BYTES = 100_000  # of a task's decks together, Flyte's page of 4 kB included
TABLE_BYTES = PAGE_BYTES // 8  # six tables at most, and what stands around them
NAMED_SUITES = 6  # of an expert, in the cell of its shares
MAX_TEXT = 1_000
ACCEPTED = ("client", "sequence", "base", "staleness", "tokens", "norm", "clip", "weight")
ACCEPTED += ("trust", "cosine", "distance", "bytes")
GATE = ("suite", "before", "after", "change", "bound", "perplexity", "accuracy", "completions", "verdict")
T = TypeVar("T")


def evaluation_html(fed: Federation, settled: Settled) -> str:
    """Return the regression table of the last try, how the experts are used, and where to look.

    At most 45 kB.
    """
    tries = _tries(fed, settled)
    if not tries or tries[-1].gate is None:
        return f"<p>{_short(settled.reason) or 'Nothing was evaluated.'}</p>"
    gate = gate_html(tries, tries[-1].gate)
    return gate + _against_champion(fed, settled) + _use_of(fed, settled) + _links(fed, settled)


def gate_html(tries: list[Try], gate: GateRecord) -> str:
    """Return the table of one gate's record, what failed first; every name is escaped."""
    verdict = "passed" if gate.passed else "failed"
    rows = sorted(gate.rows, key=lambda row: row.passed)
    table = _table(GATE, rows, _suite_cells, gate.candidate)
    return (
        f"<h3>Automatic gate {verdict} after {len(tries)} tries</h3>"
        f"<p>{_short(gate.reason)}. Losses are nats per token on held-out text; in brackets 95 % intervals, bootstrap "
        "over the suite's rows. Accuracy: next tokens guessed; completions: written whole, greedily.</p>"
        f"{table}<p>{_short(_try_text(tries))}</p>"
    )


def _suite_cells(row: SuiteChange) -> tuple[str, ...]:
    verdict = "ok" if row.passed else "failed"
    losses = (_number(row.before), _number(row.after), _change(row.before, row.after) + _spread(row.change_interval))
    held = f"{row.bound:g}" if row.judged_by == "mean" else f"{row.bound:g} ({row.judged_by} end)"
    perplexity = "–" if row.after is None else f"{_exp(row.after):.4g}"
    if row.after_interval is not None:
        perplexity += f" ({_exp(row.after_interval[0]):.4g} to {_exp(row.after_interval[1]):.4g})"
    shares = (_share(row.accuracy, row.accuracy_interval), _share(row.completions, row.completions_interval))
    return row.suite, *losses, held, perplexity, *shares, verdict


def _use_of(fed: Federation, settled: Settled) -> str:
    """Return how the candidate's experts are used, as far as its measurements are kept here."""
    candidate = find_candidate(fed, settled.candidate)
    return use_html(kept_use(fed, snapshot_of(candidate)), settled.candidate) if candidate else ""


def use_html(uses: list[ExpertUse], candidate: str) -> str:
    """Return the table of experts, what stands out first."""
    if not uses:
        return ""
    counts = ", ".join(f"{sum(each in use.standing for use in uses)} {each}" for each in STANDINGS)
    table = _table(
        ("expert", "load", "specialisation", "share of token slots", "standing"), uses, _use_cells, candidate
    )
    return (
        f"<h3>Experts: {counts} of {len(uses)}</h3><p>Load is of the even share: 1 is balanced, below {DEAD:g} dead, "
        f"above {OVERLOADED:g} overloaded. Specialisation: 0 serves all suites alike, 1 a single one; above "
        f"{SPECIALISED:g} specialised.</p>{table}"
    )


def _use_cells(use: ExpertUse) -> tuple[str, ...]:
    most = sorted(use.shares.items(), key=lambda item: (-item[1], item[0]))
    shares = ", ".join(f"{suite} {share:.3f}" for suite, share in most[:NAMED_SUITES])
    more = f" and {len(most) - NAMED_SUITES} more" if len(most) > NAMED_SUITES else ""
    return use.name, f"{use.load:.2f}", f"{use.specialisation:.2f}", shares + more, ", ".join(use.standing) or "–"


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
        f"manifest {published.snapshot}.</p>" + (f"<p>ONNX: {_short(published.onnx)}.</p>" if published.onnx else "")
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


def _spread(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:+.4f} to {interval[1]:+.4f})"


def _share(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2%}" if interval is None else f"{value:.2%} ({interval[0]:.2%} to {interval[1]:.2%})"


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond it a float overflows; such a model is broken anyway


def _change(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{after - before:+.4f}"

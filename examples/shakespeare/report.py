"""The demo's report: one HTML file without JavaScript or anything from the network, and the table on the terminal."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#975a16", "#2c7a7b", "#718096", "#e53e3e")
VERSION_COLUMNS = (
    "version",
    "parent",
    "made by",
    "accepted",
    "refused",
    "staleness",
    "KiB per update",
    "device loss",
    "status",
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e2e8f0; text-align: right; }
th { color: #4a5568; font-weight: 600; }
th:first-child, td:first-child { text-align: left; } .good { color: #2f855a; } .bad { color: #c53030; }
figure { margin: 1rem 0; } figcaption { color: #4a5568; font-size: .9rem; } code { font-size: .85em; }
"""


@dataclass(frozen=True, kw_only=True)
class VersionRow:
    """One version of the chain, as the table shows it."""

    version: int
    parent: int | None
    kind: str
    accepted: int
    refused: int
    staleness: tuple[int, ...]
    bytes_per_update: int
    status: str
    losses: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Everything the report shows; losses in nats per token, per suite and version."""

    title: str
    versions: Sequence[VersionRow]
    contributors: Sequence[tuple[int, str, int, int, float]]  # version, client, sequence, staleness, weight
    device_suites: Sequence[str]
    bits_per_byte: Mapping[str, tuple[float, float]]
    gap: Mapping[str, float]
    timings: Sequence[tuple[str, float, float]]  # part, seconds, MiB of all processes at its end
    facts: Mapping[str, str] = field(default_factory=dict)
    shortfall: str = ""  # what the rounds did not reach, in one sentence; empty when they did


def device_mean(report: DemoReport, row: VersionRow) -> float:
    """Mean held-out loss over the device domains."""
    return sum(row.losses[suite] for suite in report.device_suites) / len(report.device_suites)


def shortfall(report: DemoReport, rounds: int, *, first: int, last: int) -> str:
    """Say in one sentence what the rounds did not reach; an empty string means that all of it was reached.

    Args:
        report: with every version.
        rounds: how many versions of the devices must have been approved, each with a lower mean loss than the one
            before it.
        first: number of the snapshot that the devices started from.
        last: number of the champion after the last round.
    """
    start = [row for row in report.versions if row.version == first]
    approved = [
        row
        for row in report.versions
        if first < row.version <= last and row.kind == "devices" and row.status in ("champion", "approved")
    ]
    if len(approved) < rounds:
        return (
            f"{len(approved)} of {rounds} rounds ended with an approved version of the devices: "
            "the lines above say what became of the others"
        )
    means = [(row.version, device_mean(report, row)) for row in [*start, *approved]]
    for (before, high), (after, low) in zip(means, means[1:], strict=False):
        if not low < high:
            return (
                f"the mean device loss did not fall in every round: version {after} has {low:.4f}, "
                f"version {before} before it {high:.4f}"
            )
    return ""


def terminal_table(report: DemoReport) -> str:
    """Return the closing table as text."""
    head = (
        f"{'version':>7} {'parent':>6} {'made by':<12} {'acc/ref':>7} {'staleness':<16} {'KiB/update':>10} "
        f"{'device loss':>11} {'status':<10}"
    )
    lines = [head, "-" * len(head)]
    for row in report.versions:
        parent = "-" if row.parent is None else str(row.parent)
        staleness = ",".join(map(str, row.staleness)) or "-"
        size = f"{row.bytes_per_update / 1024:.0f}" if row.bytes_per_update else "-"
        lines.append(
            f"{row.version:>7} {parent:>6} {row.kind:<12} {row.accepted:>3}/{row.refused:<3} "
            f"{staleness[:16]:<16} {size:>10} {device_mean(report, row):>11.4f} {row.status:<10}"
        )
    return "\n".join([*lines, "", *_domain_lines(report)])


def _domain_lines(report: DemoReport) -> list[str]:
    first, last = _first_and_last(report)
    lines = [
        f"{'domain':<34} {'before':>8} {'after':>8} {'change':>8}   "
        f"nats/token, held-out lines (v{first.version} → v{last.version})"
    ]
    for suite in sorted(last.losses):
        before, after = first.losses[suite], last.losses[suite]
        lines.append(f"{suite:<34} {before:>8.4f} {after:>8.4f} {after - before:>+8.4f}")
    return lines


def _first_and_last(report: DemoReport) -> tuple[VersionRow, VersionRow]:
    """Return the first snapshot that devices got and the newest approved version."""
    approved = [row for row in report.versions if row.status in ("champion", "approved")]
    return (approved[0], approved[-1]) if approved else (report.versions[0], report.versions[-1])


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str) -> str:
    """Draw lines as inline SVG: name → points (x, y)."""
    width, height, left, bottom, top, right = 720, 300, 62, 40, 14, 190
    points = [point for line in series.values() for point in line]
    (x_low, x_high), (y_low, y_high) = (_bounds([p[i] for p in points]) for i in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        return across, top + (y_high - y) / (y_high - y_low) * (height - top - bottom)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(y_label)}" '
        f'style="width:100%;max-width:{width}px">'
    ]
    for step in range(5):
        value = y_low + (y_high - y_low) * step / 4
        _, y = place(x_low, value)
        parts.append(
            f'<path d="M{left} {y:.1f}H{width - right}" stroke="#e2e8f0"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" font-size="11">{value:.3f}</text>'
        )
    for x in sorted({point[0] for point in points}):
        across, _ = place(x, y_low)
        parts.append(
            f'<text x="{across:.1f}" y="{height - bottom + 18}" text-anchor="middle" font-size="11">{x:g}</text>'
        )
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle" font-size="12">'
        f"{html.escape(x_label)}</text>"
    )
    for index, (name, line) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [place(*point) for point in line]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places)
        y = top + 14 + 18 * index
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{marks}')
        parts.append(
            f'<rect x="{width - right + 14}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{width - right + 30}" y="{y}" font-size="11">{html.escape(name[:26])}</text>'
        )
    return "".join([*parts, "</svg>"])


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<h2>{title}</h2>\n{_table(head, rows)}"


def _signed(change: float) -> str:
    return f'<span class="{"good" if change <= 0 else "bad"}">{change:+.4f}</span>'


def render_html(report: DemoReport) -> str:
    """Return the whole report as one HTML document."""
    first, last = _first_and_last(report)
    approved = [row for row in report.versions if row.status in ("champion", "approved")] or list(report.versions)
    chart = {"mean of device domains": [(row.version, device_mean(report, row)) for row in approved]}
    for suite in report.device_suites[:7]:
        chart[suite] = [(row.version, row.losses[suite]) for row in approved]
    versions = [
        [
            f"v{row.version}",
            "–" if row.parent is None else f"v{row.parent}",
            row.kind,
            str(row.accepted),
            str(row.refused),
            ", ".join(map(str, row.staleness)) or "–",
            f"{row.bytes_per_update / 1024:.0f}" if row.bytes_per_update else "–",
            f"{device_mean(report, row):.4f}",
            row.status,
        ]
        for row in report.versions
    ]
    domains = [
        [
            html.escape(suite),
            f"{first.losses[suite]:.4f}",
            f"{last.losses[suite]:.4f}",
            _signed(last.losses[suite] - first.losses[suite]),
            "{:.3f} → {:.3f}".format(*report.bits_per_byte[suite]) if suite in report.bits_per_byte else "–",
        ]
        for suite in sorted(last.losses)
    ]
    contributors = [
        [f"v{v}", html.escape(client), str(sequence), str(staleness), f"{weight:.4f}"]
        for v, client, sequence, staleness, weight in report.contributors
    ]
    gap = [[html.escape(name), f"{value:.4f}"] for name, value in report.gap.items()]
    timings = [
        [html.escape(part), f"{seconds:.1f}", f"{mib:.0f}" if mib else "–"] for part, seconds, mib in report.timings
    ]
    facts = [[html.escape(name), f"<code>{html.escape(value)}</code>"] for name, value in report.facts.items()]
    title = html.escape(report.title)
    before_after = ["domain", f"v{first.version}", f"v{last.version}", "change", "bits per byte"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><body>",
        f"<h1>{title}</h1>",
        "<p>One Mixture-of-Experts language model, trained by devices that never showed their text. "
        "Losses are nats per token on held-out lines; lower is better.</p>",
        f"<p class=bad>{html.escape(report.shortfall)}</p>" if report.shortfall else "",
        "<h2>Loss per device domain</h2><figure>",
        line_chart(chart, x_label="version", y_label="held-out loss, nats per token"),
        "<figcaption>Approved versions only; the first point is the snapshot that devices started from."
        "</figcaption></figure>",
        _section("Versions", VERSION_COLUMNS, versions),
        _section("Loss per domain, before and after", before_after, domains),
        _section("Who contributed what", ["version", "client", "sequence", "staleness", "weight ω"], contributors),
        _section("Against a centralised LoRA", ["quantity", "value"], gap),
        _section("Time and memory", ["part", "seconds", "MiB at its end"], timings),
        _section("Proof", ["fact", "value"], facts),
        "</body></html>",
    ]
    return "\n".join(parts)


def write_html(report: DemoReport, path: Path) -> Path:
    """Write the report and return its path."""
    path.write_text(render_html(report), encoding="utf-8")
    return path


def write_json(report: DemoReport, path: Path) -> Path:
    """Write what the report shows as JSON, for figures, and return its path."""
    path.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    return path

"""What somebody may do to an audit log: shared by its tests and its figure."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fednested_lib.audit import AuditLog, Decision

EDITS = (
    *("field edited", "byte flipped", "record deleted", "records deleted", "neighbours swapped", "records swapped"),
    *("record doubled", "record forged", "end cut", "cut to nothing", "line emptied", "anchor put back"),
    *("end cut with its anchor", "end cut with a true anchor", "mac copied", "anchor edited"),
)


def places(home: Path) -> tuple[Path, Path]:
    """Return log and anchor."""
    return home / "audit/log.jsonl", home / "anchor/anchor.json"


def write_log(home: Path, n: int, first: int = 0) -> None:
    """Append decisions on n updates."""
    log = AuditLog(home / "audit", anchor=home / "anchor")
    start = max(first, 0) if first else log.anchor.count
    for sequence in range(start, start + n):
        log.append(
            Decision(
                decision="released",
                time_s=1e9 + sequence,
                policy_version=1,
                sequence=sequence,
                payload_sha256=f"{sequence:064x}",
                payload_bytes=1000 + sequence,
                experts=8,
                withheld=1,
                norm=0.5,
                epsilon=0.0,
            )
        )


def tampered(home: Path, edit: str, rng: random.Random) -> None:
    """Change the log of `home` in one way; every result differs from an untouched log."""
    log, anchor = places(home)
    lines = log.read_bytes().splitlines(keepends=True)
    i, j = sorted(rng.sample(range(len(lines)), 2))
    before = list(lines)
    if edit == "field edited":
        field, value = rng.choice([("decision", "refused"), ("payload_bytes", 1), ("time_s", 5.0), ("norm", 0.25)])
        lines[i] = _line({**json.loads(lines[i]), field: value})
    elif edit == "byte flipped":
        at = rng.randrange(len(lines[i]) - 1)
        lines[i] = lines[i][:at] + bytes([lines[i][at] ^ (1 << rng.randrange(7))]) + lines[i][at + 1 :]
    elif edit == "record deleted":
        del lines[i]
    elif edit == "records deleted":
        del lines[i:j]
    elif edit == "neighbours swapped":
        i = min(i, len(lines) - 2)
        lines[i], lines[i + 1] = lines[i + 1], lines[i]
    elif edit == "records swapped":
        lines[i], lines[j] = lines[j], lines[i]
    elif edit == "record doubled":
        lines.insert(i, lines[i])
    elif edit == "record forged":
        record = json.loads(lines[i])
        lines.append(_line({**record, "n": len(lines), "mac": f"{rng.getrandbits(256):064x}"}))
    elif edit == "end cut":
        del lines[j:]
    elif edit == "cut to nothing":
        lines = []
    elif edit == "line emptied":
        lines[i] = b"\n"
    elif edit == "mac copied":
        lines[i] = _line({**json.loads(lines[i]), "mac": json.loads(lines[j])["mac"]})
    elif edit == "end cut with a true anchor":  # kept from then, or read in the log: the writer's key knows better
        del lines[j:]
        _write_anchor(anchor, len(lines), json.loads(lines[-1])["mac"])
    elif edit == "end cut with its anchor":
        del lines[j:]
        _write_anchor(anchor, len(lines), f"{rng.getrandbits(256):064x}")
    elif edit == "anchor put back":
        n = rng.randrange(len(lines) - 1)
        _write_anchor(anchor, n, json.loads(lines[n - 1])["mac"] if n else "0" * 64)
    elif edit == "anchor edited":
        _write_anchor(anchor, len(lines), f"{rng.getrandbits(256):064x}")
    else:
        raise ValueError(edit)
    assert lines != before or edit.startswith("anchor")
    log.write_bytes(b"".join(lines))


def _line(record: dict) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _write_anchor(path: Path, count: int, mac: str) -> None:
    path.write_text(json.dumps({"count": count, "mac": mac}))

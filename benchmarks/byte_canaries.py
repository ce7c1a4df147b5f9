"""Strings that exist nowhere else, in everything a device reads, looked for in every byte that it sends.

A device runs whole (trainer, spool, sidecar, outbox, telemetry) in a process of its own against a small tier 1. Its
rows, file and directory names, environment, user, host, comments of its configuration and policy, and stray files in
its spool hold canaries. What it sent is searched as it is, and whatever can be unpacked of it: zstd, gzip, zlib, base64
and hex, three deep; for each canary as text, UTF-16, hex and base64.

    python -m benchmarks.byte_canaries DIRECTORY OUT      (what the process does)
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import os
import random
import re
import socket
import string
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import cramjam
import structlog

from benchmarks.results import ROOT

KINDS = (
    *("row", "heldout", "file", "directory", "home", "variable", "user", "host", "comment", "policy-comment"),
    *("spool", "key-file"),
)
CANARIES = {kind: f"Kanarie{i:02d}{kind.replace('-', '')}Zq7x" for i, kind in enumerate(KINDS)}
DEPTH = 3
RANK = 12  # of adapters: their payloads are too large for the log itself


@functools.cache
def findings() -> tuple[tuple[str, str], ...]:
    """Run the device and return (canary, where) of every canary found in what it sent.

    Raises:
        RuntimeError: the search misses a canary that was put there, or the device sent too little to search.
    """
    _check_search()
    with tempfile.TemporaryDirectory() as place:
        directory, out = Path(place) / CANARIES["directory"], Path(place) / "out"
        directory.mkdir()
        out.mkdir()
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HF_HUB_OFFLINE") if name in os.environ},
            **dict.fromkeys(("USER", "LOGNAME", "USERNAME"), CANARIES["user"]),
            **{"HOSTNAME": CANARIES["host"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            "FEDNESTED_NOTE": CANARIES["variable"],
        }
        command = [sys.executable, "-m", "benchmarks.byte_canaries", str(directory), str(out)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the device failed: {done.stderr.strip().splitlines()[-1]}")
        parts = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    kinds = {name.split("-")[0] for name in parts}
    if kinds != {"record", "blob", "telemetry"} or sum(map(len, parts.values())) < 10_000:
        raise RuntimeError(f"the device sent {sorted(parts)}: nothing to search")
    return tuple((kind, name) for name, data in parts.items() for kind in found_in(data))


def found_in(data: bytes) -> set[str]:
    """Return the kinds of canaries that occur in some bytes or in what they unpack to."""
    views, found = {data}, set()
    for _ in range(DEPTH):
        for view in views:
            found |= {kind for kind, canary in CANARIES.items() if any(form in view for form in _forms(canary))}
        views = {inner for view in views for inner in _unpacked(view) if inner != view}
    return found | {k for k, canary in CANARIES.items() for v in views if any(form in v for form in _forms(canary))}


@functools.cache
def _forms(canary: str) -> tuple[bytes, ...]:
    text = canary.encode()
    forms = [text, text.lower(), text.upper(), text[::-1], text.hex().encode(), text.hex().upper().encode()]
    forms += [canary.encode("utf-16-le"), canary.encode("utf-16-be")]
    for wide in (text, canary.encode("utf-16-le")):
        for shift in range(3):  # what of base64 does not depend on the bytes around it
            for coded in (base64.b64encode, base64.urlsafe_b64encode):
                body = coded(b"\0" * shift + wide + b"\0" * 3)
                forms.append(body[-(-8 * shift // 6) + 1 : (8 * (shift + len(wide))) // 6 - 1])
    return tuple(forms)


def _unpacked(data: bytes) -> list[bytes]:
    views = []
    for match in re.finditer(rb"\x28\xb5\x2f\xfd", data):
        views += _try(lambda rest: bytes(cramjam.zstd.decompress(rest)), data[match.start() :])
    for match in re.finditer(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]", data):
        views += _try(lambda rest: zlib.decompressobj(47).decompress(rest, 1 << 26), data[match.start() :])
    views += _try(lambda rest: zlib.decompressobj(-15).decompress(rest, 1 << 26), data)
    for match in re.finditer(rb"[A-Za-z0-9+/_-]{24,}", data):
        run = match[0].translate(bytes.maketrans(b"-_", b"+/"))
        views += [each for shift in range(4) for each in _try(_base64, run[shift:])]
    for match in re.finditer(rb"(?:[0-9a-fA-F]{2}){12,}", data):
        views += _try(lambda run: bytes.fromhex(run.decode()), match[0])
    return views


def _base64(run: bytes) -> bytes:
    return base64.b64decode(run[: len(run) // 4 * 4])


def _try(unpack, data: bytes) -> list[bytes]:
    try:
        return [unpack(data)]
    except Exception:  # whatever a decoder thinks of bytes that are not its own
        return []


def _check_search() -> None:
    """Put every canary where it must be found, in every form."""
    for kind, canary in CANARIES.items():
        text = b"x" * 5 + canary.encode() + b"y" * 40
        deflated = zlib.compressobj(wbits=-15)
        forms = [
            *(text, canary.encode("utf-16-le"), text.hex().encode(), base64.b64encode(text)),
            *(base64.urlsafe_b64encode(b"ab" + text), zlib.compress(text), bytes(cramjam.gzip.compress(text))),
            *(b"head" + bytes(cramjam.zstd.compress(text)), deflated.compress(text) + deflated.flush()),
            *(base64.b64encode(zlib.compress(text)), bytes(cramjam.zstd.compress(base64.b64encode(text * 3)))),
        ]
        for number, form in enumerate(forms):
            if kind not in found_in(form):
                raise RuntimeError(f"canary {kind} was not found in form {number}")


def _run_device(directory: Path, out: Path) -> None:
    from benchmarks.small_federation import SmallFederation
    from fednested_lib.client import run
    from fednested_lib.config import load_tier2
    from fednested_lib.log import CONTROL, TOPICS

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    socket.gethostname = lambda: CANARIES["host"]
    federation = SmallFederation(directory, seed=0, n_devices=1, adapters={}, training={}, sections={})
    tier1 = federation.tier1
    config = load_tier2(_write_device(directory, tier1))
    before = {path for path in (tier1.home / "payloads").rglob("*") if path.is_file()}
    run(config, log=tier1.log)
    for topic in TOPICS:
        if topic != CONTROL:
            for number, record in enumerate(tier1.log.read(topic, tier1.log.watermarks(topic))):
                kind = "telemetry" if topic.startswith("telemetry") else "record"
                headers = b"\n".join(name.encode() + b"=" + value for name, value in record.headers)
                (out / f"{kind}-{number}").write_bytes(record.key + b"\n" + headers + b"\n" + record.value)
    for number, path in enumerate(sorted({p for p in (tier1.home / "payloads").rglob("*") if p.is_file()} - before)):
        (out / f"blob-{number}").write_bytes(path.name.encode() + b"\n" + path.read_bytes())
    federation.close()


def _babble(rng: random.Random) -> str:
    return "".join(rng.choice(string.printable[:95]) for _ in range(160))


def _write_device(directory: Path, tier1) -> Path:
    from fednested_lib.signing import Signer
    from tests.policies import SITE, write_text_policy

    place = directory / "device"
    place.mkdir()
    for kind in ("row", "heldout"):
        rng = random.Random(kind)
        rows = (json.dumps({"text": f"{CANARIES[kind]} {_babble(rng)} {CANARIES[kind]}"}) for _ in range(60))
        (place / f"{CANARIES['file']}-{kind}.jsonl").write_text("\n".join(rows))
    Signer.generate().save(place / f"{CANARIES['key-file']}.key")
    write_text_policy(place / "policy.yaml", comment=CANARIES["policy-comment"], rank=RANK)
    home = place / CANARIES["home"]
    (home / "spool").mkdir(parents=True)
    for name in (f"{CANARIES['spool']}.json", f"{CANARIES['spool']}.factors", "000000000099.factors"):
        (home / "spool" / name).write_text(CANARIES["spool"])
    path = place / "tier2.yaml"
    path.write_text(
        f"# {CANARIES['comment']}\n"
        f"client_id: romeo\nkey: {CANARIES['key-file']}.key\nhome: {CANARIES['home']}\n"
        f"data: {CANARIES['file']}-row.jsonl\nheldout: {CANARIES['file']}-heldout.jsonl\n"
        f"blobs_uri: {tier1.home / 'blobs'}\npayloads_uri: {tier1.home / 'payloads'}\n"
        f"control: {{public_key: '{tier1.signer.public_key}', poll_s: 0.05}}\n"
        f"policy: {{file: policy.yaml, public_key: '{SITE.public_key}'}}\n"
        f"adapters: {{rank: {RANK}, alpha: {2.0 * RANK}}}\n"
        "training: {steps: 4, batch_size: 4, seq_len: 32, max_updates: 3, updates_per_base: 3}\n"
    )
    return path


if __name__ == "__main__":
    _run_device(Path(sys.argv[1]), Path(sys.argv[2]))

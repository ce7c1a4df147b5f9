"""What keeps a device from working, found before it works: `fednested tier2 doctor`.

    configuration → key, text, policy, audit log → disk, memory, outbox → isolation, schedule → certificates, tier 1

Each check is a few `Finding`s with the value, its bound and the remedy. What is wrong with one part keeps no other from
being looked at, and nothing is changed: no directory is made, no policy version remembered, no update sent.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

from fednested_lib.audit import verify_audit
from fednested_lib.config import Tier2Config, load_tier2
from fednested_lib.errors import ConfigError, FednestedError
from fednested_lib.finding import Finding, judge, look
from fednested_lib.isolation import LEVELS, account, probe
from fednested_lib.log import CONTROL
from fednested_lib.orders import Orders, orders_path, read_note
from fednested_lib.outbox_survey import read_survey
from fednested_lib.policy import load_policy
from fednested_lib.schedule import read_device, why_not
from fednested_lib.sidecar import audit_places, check_config
from fednested_lib.signing import Signer
from fednested_lib.text import require_text
from fednested_lib.transport import open_transport

MIB = 1 << 20
SPARE_DISK_BYTES = 256 * MIB  # beside what the outbox may hold
SPARE_MEMORY_BYTES = 1024 * MIB  # torch, transformers and a small model
MAX_SKEW_S = 60.0
EXPIRY_DAYS = 14


def examine(path: str | os.PathLike) -> Iterator[Finding]:
    """Look at everything that a device needs to work.

    Args:
        path: tier2.yaml.
    """
    try:
        config = load_tier2(path)
    except FednestedError as error:
        yield Finding(what="configuration", state="bad", value=str(error))
        return
    yield Finding(what="configuration", state="ok", value=f"{path}: {config.client_id} of {config.federation}")
    checks = (key, text, policy, audit, disk, memory, outbox, isolation, schedule, certificates, tier1)
    for check in checks:
        yield from look(check.__name__, lambda check=check: check(config))


def key(config: Tier2Config) -> Iterator[Finding]:
    """Is the device's key there, and readable by nobody else?"""
    public = Signer.load(config.key).public_key
    mode = stat.S_IMODE(config.key.stat().st_mode)
    yield judge(
        "key",
        holds=not mode & 0o077,
        value=f"{config.key} has mode {mode:04o}, public key {public[:12]}…",
        bound="0600",
        remedy=f"chmod 600 {config.key}",
    )


def text(config: Tier2Config) -> Iterator[Finding]:
    """Is there text to train on?"""
    require_text(config.data)
    yield Finding(what="text", state="ok", value=f"{config.data}, {config.data.stat().st_size} bytes")


def policy(config: Tier2Config) -> Iterator[Finding]:
    """Is the policy signed by the site's key, does it allow what is configured, and is that key somewhere else?"""
    signed = load_policy(config.policy.file, config.policy.public_key)
    check_config(signed, config)
    dp = "off" if signed.dp == "off" else "on"
    yield Finding(what="policy", state="ok", value=f"{config.policy.file}, version {signed.version}, dp {dp}")
    beside = config.policy.file.parent / "site-policy.key"
    yield judge(
        "site's policy key",
        holds=not beside.exists(),
        value=f"{beside} exists" if beside.exists() else "not on this device",
        bound="elsewhere",
        remedy="move it to whoever answers for the site's data; on the device it can be used to loosen the policy",
        otherwise="warning",
    )


def audit(config: Tier2Config) -> Iterator[Finding]:
    """Does the audit log verify against its anchor?"""
    log, anchor = audit_places(config)
    if not (log / "log.jsonl").exists():
        yield Finding(what="audit log", state="ok", value=f"no record in {log} yet")
        return
    yield Finding(what="audit log", state="ok", value=str(verify_audit(log, anchor=anchor)))


def disk(config: Tier2Config) -> Iterator[Finding]:
    """Is there room for a full outbox and a snapshot beside the one that is held?"""
    place = next(each for each in (config.home, *config.home.parents) if each.is_dir())
    free, wanted = shutil.disk_usage(place).free, config.outgoing.outbox_bytes + SPARE_DISK_BYTES
    wanted += sum(each.stat().st_size for each in (config.home / "blobs").rglob("*") if each.is_file())
    yield judge(
        "disk",
        holds=free >= wanted and os.access(place, os.W_OK | os.X_OK),
        value=f"{free // MIB} MiB free at {place}{'' if os.access(place, os.W_OK) else ', not writable'}",
        bound=f"≥ {wanted // MIB} MiB, writable",
        remedy="free space, lower outgoing.outbox_bytes, or set home to another disk; a full disk loses nothing",
    )


def memory(config: Tier2Config) -> Iterator[Finding]:
    """Is there memory for the trainer? The model's own size is known once a snapshot was fetched."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        yield Finding(what="memory", state="warning", value="/proc/meminfo cannot be read", remedy="look by hand")
        return
    held = sum(each.stat().st_size for each in (config.home / "blobs").rglob("*") if each.is_file())
    wanted = SPARE_MEMORY_BYTES + 2 * held
    yield judge(
        "memory",
        holds=found >= wanted,
        value=f"{found // MIB} MiB available",
        bound=f"≥ {wanted // MIB} MiB",
        remedy="model.frozen: int8 or int4, a smaller training.batch_size, fewer adapters.experts",
        otherwise="warning",
    )


def outbox(config: Tier2Config) -> Iterator[Finding]:
    """How much waits, and was anything refused for good? Reads beside a sidecar that runs."""
    if not (config.home / "outbox").is_dir():
        yield Finding(what="outbox", state="ok", value="nothing was sent yet")
        return
    survey = read_survey(config.home / "outbox")
    used, dead = sum(row.payload_bytes for row in survey.rows), [row for row in survey.rows if row.state == "dead"]
    yield judge(
        "outbox",
        holds=used < config.outgoing.outbox_bytes,
        value=f"{len(survey.rows)} updates that tier 1 has not settled, {used} bytes",
        bound=f"< {config.outgoing.outbox_bytes} bytes",
        remedy="let it send and wait for receipts, or raise outgoing.outbox_bytes",
    )
    if dead:
        yield Finding(
            what="refused for good",
            state="warning",
            value=f"{len(dead)}, the last for: {dead[-1].last_error}",
            remedy="`fednested tier2 outbox` lists them; they stay as evidence until tier 1 names them",
        )


def isolation(config: Tier2Config) -> Iterator[Finding]:
    """Which isolation does this machine allow, tried in a process that ends at once?"""
    named = config.isolation
    user = account(named.trainer_user) if named.trainer_user is not None and os.getuid() == 0 else None
    reached, _ = probe(user)
    yield judge(
        "isolation",
        holds=LEVELS.index(reached.level) >= LEVELS.index(named.require),
        value=str(reached),
        bound=f"≥ {named.require}",
        remedy="start as root with isolation.trainer_user and isolation.sidecar_user, or use the units in deploy/edge/",
    )
    if reached.level == "none" and named.require == "none":
        yield Finding(
            what="trainer's network",
            state="warning",
            value="the process that sees the text could open a connection",
            remedy="allow network namespaces, or use the systemd units in deploy/edge/",
        )


def schedule(config: Tier2Config) -> Iterator[Finding]:
    """May it train now, and can every bound of the schedule be read here?"""
    found = read_device()
    reason = why_not(config.schedule, found, datetime.now())
    sensors = ", ".join(f"{name} {value}" for name, value in vars(found).items() if value is not None) or "no sensors"
    unknown = reason is not None and reason.endswith("_unknown")
    yield Finding(
        what="schedule",
        state="bad" if unknown else "ok",
        value=f"{'may train now' if reason is None else f'waits: {reason}'} ({sensors})",
        remedy="this device has no such sensor and would never train: leave the bound out" if unknown else "",
    )


def certificates(config: Tier2Config) -> Iterator[Finding]:
    """Do the gateway's certificates parse, and are they valid for a while?"""
    from cryptography import x509

    gateway = config.gateway if config.transport == "http" else None
    files = {} if gateway is None else {"ca_file": gateway.ca_file, "cert_file": gateway.cert_file}
    for name, path in files.items():
        if path is None:
            continue
        try:
            found = x509.load_pem_x509_certificates(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"gateway.{name} {path} holds no PEM certificate ({error}): fix the file") from None
        now = datetime.now(timezone.utc)
        begins = max(each.not_valid_before_utc for each in found)
        days = (min(each.not_valid_after_utc for each in found) - now).days
        yield judge(
            f"gateway.{name}",
            holds=begins <= now and days >= EXPIRY_DAYS,
            value=f"{path}: valid from {begins:%Y-%m-%d}, {days} days left",
            bound=f"≥ {EXPIRY_DAYS} days",
            remedy="renew it; if it begins in the future, set this device's clock",
            otherwise="bad" if begins > now or days < 0 else "warning",
        )


def tier1(config: Tier2Config) -> Iterator[Finding]:
    """Does the broker or the gateway answer, is the control topic there, and does the clock agree?"""
    where = config.gateway.url if config.transport == "http" else config.log.servers()
    with closing(open_transport(config)) as transport:
        low, high = transport.log.watermarks(CONTROL)[0]
        yield Finding(what="tier 1", state="ok", value=f"{config.transport} {where}: {high - low} control events kept")
        skew_s = transport.skew_s
    if skew_s is None:
        yield Finding(what="clock", state="ok", value="not compared: a broker tells no time")
    else:
        yield judge(
            "clock",
            holds=abs(skew_s) <= MAX_SKEW_S,
            value=f"{-skew_s:+.0f} s against the gateway",
            bound=f"± {MAX_SKEW_S:.0f} s",
            remedy="set it (timedatectl set-ntp true); certificates and signed requests depend on it",
            otherwise="warning",
        )
    orders = read_note(orders_path(config.home), Orders)
    model = orders.model if orders is not None else None
    told = f"version {model.version}" if model is not None else "none yet"
    yield Finding(what="model held", state="ok", value=told)

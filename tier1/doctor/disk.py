"""What lies on disk: keys, data, policy, the chain, the stores, room."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from fednested_lib.blobs import create_exclusive
from fednested_lib.errors import ChainError
from fednested_lib.finding import Finding, judge
from fednested_lib.signing import Signer
from tier1.config import Tier1Config
from tier1.doctor import pods
from tier1.federation import Federation
from tier1.governance.policy_file import PolicyFile
from tier1.governance.ports import AccessRequest

GIB = 1 << 30
STORES = ("blobs", "payloads", "archive")
# With training and publishing, all that the loops ask the policy for on their own; promotion is a person's.
NEEDED = (
    ("aggregate", "topic:updates.experts.local", {"purpose": "fold"}),
    ("aggregate", "topic:updates.tier1", {"purpose": "fold"}),
)


def keys(config: Tier1Config) -> Iterator[Finding]:
    """Is the signing key ours alone, and does anybody count its signatures?"""
    path = config.identity.key
    signer = Signer.load(path)
    mode = stat.S_IMODE(os.stat(path).st_mode)
    yield judge(
        "signing key",
        holds=not mode & 0o077 or (pods.is_pod(os.environ) and not mode & 0o037),  # 0440: what fsGroup makes of 0400
        value=f"{path} has mode {mode:04o}",
        bound="0600",
        remedy=f"chmod 600 {path}; a mounted secret has defaultMode: 0400, of which fsGroup makes 0440",
        otherwise="warning",
    )
    yield judge(
        "trusted signatures",
        holds=signer.public_key in config.identity.trusted,
        value=f"{signer.public_key[:12]}…",
        bound="in identity.trusted",
        remedy="put the public key of identity.key under identity.trusted",
    )


def people(config: Tier1Config) -> Iterator[Finding]:
    """Can anybody decide, and is anybody there to learn from?"""
    governance = config.governance
    yield judge(
        "approvers",
        holds=bool(governance.approvers) or governance.allow_unverified,
        value=f"{len(governance.approvers)}",
        bound="≥ 1, or allow_unverified",
        remedy="register public keys under governance.approvers, or every decision is refused",
    )
    yield judge(
        "devices",
        holds=bool(config.devices),
        value=f"{len(config.devices)}",
        bound="≥ 1",
        remedy="register client ids and public keys under devices, or every update is refused",
        otherwise="warning",
    )


def data(config: Tier1Config) -> Iterator[Finding]:
    """Can the governed files be read here?"""
    named = {f"dataset {name}": path for name, path in config.core.datasets.items()}
    named |= {f"suite {name}": path for name, path in config.evaluation.suites.items()}
    for what, path in named.items():
        readable = path.is_file() and os.access(path, os.R_OK)
        value = f"{path}, {path.stat().st_size} bytes" if readable else f"{path} cannot be read"
        yield judge(
            what, holds=readable, value=value, bound="a readable file", remedy="fix the path or its permissions"
        )


def policy(config: Tier1Config) -> Iterator[Finding]:
    """Does the policy parse, and let this principal fold and train? Nothing is written to the audit log."""
    rules = PolicyFile(config.governance.policy)
    yield Finding(what="policy", state="ok", value=f"{config.governance.policy}, {rules.identity[5:17]}…")
    published = ("publish", f"model:{config.registry.model_name}", {})
    trained = (("train", f"dataset:{name}", {"purpose": "core-update"}) for name in config.core.datasets)
    for action, resource, context in (*NEEDED, published, *trained):
        request = AccessRequest(principal=config.identity.principal, action=action, resource=resource, context=context)
        decision = rules.decide(request)
        yield judge(
            f"may {action}",
            holds=decision.allowed,
            value=f"{config.identity.principal} on {resource}: {decision.reason}",
            bound="allowed",
            remedy=f"allow it in {config.governance.policy}",
        )


def chain(fed: Federation) -> Iterator[Finding]:
    """Does every entry verify, and are head's weights there?"""
    if not fed.chain.exists():
        yield Finding(what="chain", state="ok", value=f"no entry in {fed.chain.root}: the first core update makes one")
        return
    state = fed.chain.state()
    value = f"{state.next_seq} entries verified, head {state.head.version}, champion {_champion(fed)}"
    yield Finding(what="chain", state="ok", value=value)
    wanted = set(state.head.blobs.values())
    lacking = sorted(digest for digest in wanted if not fed.blobs.has(digest))
    yield judge(
        "weights of head",
        holds=not lacking,
        value=f"{len(wanted) - len(lacking)} of {len(wanted)} blobs",
        bound="all",
        remedy=f"fednested tier1 replay --version {state.head.version} restores them from the archive",
    )


def _champion(fed: Federation) -> str:
    try:
        return str(fed.chain.state().champion.version)
    except ChainError:
        return "none"


def stores(fed: Federation) -> Iterator[Finding]:
    """Can home be written, and does it know create-if-absent? A probe is written and taken away again."""
    home = fed.home
    if not home.is_dir():
        parent = next(place for place in home.parents if place.exists())
        yield judge(
            "home",
            holds=parent.is_dir() and os.access(parent, os.W_OK | os.X_OK),
            value=f"{home} does not exist yet",
            bound=f"{parent} is a directory that can be written",
            remedy="make it, or fix permissions; the first loop makes it otherwise",
        )
        return
    for place in (home, *(home / name for name in STORES if (home / name).is_dir())):
        probe = place / f".doctor-{uuid.uuid4().hex}"
        try:
            first, second = create_exclusive(probe, b"probe"), create_exclusive(probe, b"again")
            kept = probe.read_bytes() == b"probe"
        finally:
            probe.unlink(missing_ok=True)
        yield judge(
            f"store {place.name}",
            holds=first and not second and kept,
            value=f"{place}: " + ("a second creation is refused" if not second else "a second creation succeeds"),
            bound="create-if-absent",
            remedy="use a file system with hard links; two committers would overwrite each other",
        )


def room(fed: Federation) -> Iterator[Finding]:
    """Is there room for two more versions as large as head's, and at least one GiB?"""
    place = next(place for place in (fed.home, *fed.home.parents) if place.is_dir())
    free, wanted = shutil.disk_usage(place).free, GIB
    if fed.chain.exists():
        sizes = (_size(Path(fed.blobs.location(digest))) for digest in set(fed.chain.state().head.blobs.values()))
        wanted = max(wanted, 2 * sum(sizes))
    yield judge(
        "disk",
        holds=free >= wanted,
        value=f"{free / GIB:.1f} GiB free at {place}",
        bound=f"≥ {wanted / GIB:.1f} GiB",
        remedy="free or add space before the next round; a full disk stops a loop and loses nothing",
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def lineage(fed: Federation) -> Iterator[Finding]:
    """Is the outbox whole, and how much waits in it?"""
    waiting = sum(1 for _ in fed.lineage.proposals())
    yield Finding(what="lineage outbox", state="ok", value=f"{waiting} proposals in {fed.home / 'lineage.jsonl'}")

"""Sets the stage of the demo: data, keys, configuration; and answers the decision gate as the approver."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.measure import tree_bytes
from examples.shakespeare.corpus import Corpus
from examples.shakespeare.devices import make_keys, write_config
from examples.shakespeare.settings import DemoSettings
from fednested_lib.errors import ConfigError
from fednested_lib.signing import Signer
from tier1.federation import Federation, open_federation
from tier1.workspace import create_workspace

MARKER = ".fednested-demo"


@dataclass
class Timings:
    """Wall time of each part of the demo, and the memory of all its processes at the part's end."""

    rows: list[tuple[str, float, float]] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time one part and print it when it is done."""
        began = time.monotonic()
        print(f"\n── {name}", flush=True)
        yield
        seconds, mib = time.monotonic() - began, tree_bytes(psutil.Process().pid) / 2**20
        self.rows.append((name, seconds, mib))
        print(f"   {seconds:.1f} s, {mib:.0f} MiB at its end", flush=True)


def clear(directory: Path) -> Path:
    """Make an empty run directory; only one that an earlier demo made is removed.

    Raises:
        ConfigError: the directory holds something else.
    """
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).exists():
        raise ConfigError(f"{directory} is not empty and not from a demo: choose another --out")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / MARKER).touch()
    return directory


FEDERATION = "fednested"


def write_tier1(
    run: Path, corpus: Corpus, settings: DemoSettings, *, bootstrap: str, registry: str
) -> tuple[Path, Path]:
    """Write tier1.yaml, and late.yaml for the core update that runs beside the rounds; returns both paths."""
    keys = make_keys(run / "devices", sorted(corpus.devices))
    core = {
        "steps": settings.bootstrap_steps,
        "batch_size": settings.bootstrap_batch,
        "learning_rate": settings.bootstrap_rate,
        "seq_len": settings.seq_len,
        "seed": settings.seed,
        "threads": settings.threads,
    }
    sections = {
        "federation": FEDERATION,
        "log": {"bootstrap": bootstrap},
        "model": {"seed": settings.seed, "vocab_size": vocabulary(corpus.tier1.stat().st_size)},
        "core": core,
        "window": {"min_updates": min(settings.window, len(corpus.devices)), "max_wait_s": settings.max_wait_s},
        "evaluation": {
            "max_regression": settings.max_regression,
            "max_tokens": settings.suite_tokens,
            "seq_len": settings.seq_len,
        },
        "registry": {"uri": registry},
    }
    places = {
        "datasets": {"tier1": str(corpus.tier1)},
        "suites": {name: str(path) for name, path in corpus.suites.items()},
        "devices": keys,
    }
    path = create_workspace(run, **places, overrides=sections)
    late = {**core, "steps": settings.late_core_steps, "seed": settings.seed + 1}
    eta = {"eta_core": settings.late_core_eta, "eta_t1": settings.late_core_eta, "eta_t2": 1.0}
    return path, create_workspace(run, **places, overrides={**sections, "core": late, "rates": eta}, name="late.yaml")


def vocabulary(text_bytes: int) -> int:
    """Return a vocabulary size that this much tier-1 text can fill."""
    return 1024 if text_bytes > 200_000 else 512 if text_bytes > 40_000 else 300


def write_tier2(run: Path, corpus: Corpus, settings: DemoSettings, *, bootstrap: str, slow: str) -> dict[str, Path]:
    """Write one tier2.yaml per device and return client id → path."""
    control_key = Signer.load(run / "keys/tier1.key").public_key
    return {
        client: write_config(
            run / "devices",
            client,
            data=data,
            heldout=corpus.suites[f"device-{client}"],
            home=run / "home",
            bootstrap=bootstrap,
            federation=FEDERATION,
            control_key=control_key,
            pace_s=settings.slow_pace_s if client == slow else 0.0,
            settings=settings,
        )
        for client, data in corpus.devices.items()
    }


class Approver:
    """Answers the gate as SecOps would: with a token signed by the approver's own key for the version that waits."""

    def __init__(self, config: Path):
        self._config = config
        self._signer = Signer.load(config.parent / "keys/approver.key")

    def __call__(self) -> str:
        from tier1.governance.approvals import issue
        from tier1.loops.evaluate_and_promote import waiting_versions

        fed: Federation = open_federation(self._config)
        waiting = waiting_versions(fed)
        if not waiting:
            return "approve"  # nothing waits: the gate only wants a line
        version, manifest = waiting[-1]
        print(f"   secops approves version {version} (manifest {manifest[:12]}) with a signed token")
        name = fed.config.governance.approvers[self._signer.public_key]
        return issue(
            self._signer,
            verdict="approve",
            manifest_digest=manifest,
            approver=name,
            issued_at=int(time.time()),
            reason="demo",
        )

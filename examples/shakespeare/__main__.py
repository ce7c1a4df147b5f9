"""`make demo`: the whole nested federation on this machine, on real text.

One genre of Shakespeare bootstraps tier 1; seven speakers of the other genres are devices, each a process of its own
that never shows its text. Three nested rounds, a core update that ends after two of them, a proof that every version
can be rebuilt from the log, and a report.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

from examples.shakespeare import corpus as plays
from examples.shakespeare.baseline import run_all
from examples.shakespeare.corpus import Corpus
from examples.shakespeare.devices import Fleet
from examples.shakespeare.progress import arrivals
from examples.shakespeare.report import DemoReport, VersionRow, shortfall, terminal_table, write_html, write_json
from examples.shakespeare.settings import DemoSettings
from examples.shakespeare.stage import Approver, Timings, clear, write_tier1, write_tier2
from fednested_lib.errors import FednestedError
from services.embedded import EmbeddedMlflow, bootstrap_servers
from services.gates import answer_gates
from tier1.federation import open_federation

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    options = _parser().parse_args(arguments)
    _quiet()
    try:
        report = run(
            Path(options.out),
            options.data and Path(options.data),
            DemoSettings(seed=options.seed),
            baseline=not options.no_baseline,
        )
    except FednestedError as error:
        if options.debug:
            raise
        print(f"fednested: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted: brokers, servers and devices were stopped; run it again", file=sys.stderr)
        return 130
    if report.shortfall:
        print(f"fednested: {report.shortfall}", file=sys.stderr)
    return 1 if report.shortfall else 0


def run(out: Path, data: Path | None, settings: DemoSettings, *, baseline: bool = True) -> DemoReport:
    """Run the federation in `out` and write its report."""
    timings = Timings()
    run_dir = clear(out.absolute())
    with EmbeddedServers(run_dir) as servers:
        with timings.part("data: plays, speakers, held-out lines" if data is None else f"data: {data}"):
            corpus = _prepare(run_dir / "data", data, settings)
        late, fed_config = _configure(run_dir, corpus, settings, servers)
        approver = Approver(fed_config)
        with timings.part("tier 1 bootstraps: core update, evaluation, approval, broadcast"):
            _bootstrap(fed_config, servers, approver)
        slow = sorted(corpus.devices)[-1]
        devices = write_tier2(run_dir, corpus, settings, bootstrap=servers.bootstrap, slow=slow)
        print(f"   {len(devices)} devices: {', '.join(sorted(devices))}; {slow} is slow, its updates arrive stale")
        with Fleet(devices) as fleet, _late_core_update(late, run_dir):
            for number in range(1, settings.rounds + 1):
                with timings.part(f"nested round {number}: cut, fold, gate, approval, broadcast"):
                    _nested_round(fed_config, approver)
                    fleet.check()
            last = open_federation(fed_config).chain.state().champion.version
            _end_of_federation(fed_config)
            fleet.wait(settings.slow_pace_s + 30)
        with timings.part("the core update that began in round 1 lands on the newest head"):
            _settle_late(fed_config, approver)
        with timings.part("proof: every version rebuilt from genesis and the archived inputs"):
            facts = _prove(fed_config)
        gap = {}
        if baseline:
            with timings.part("yardstick: centralised LoRA, three learning rates"):
                gap = _gap(fed_config, corpus, settings, last)
        report = _report(fed_config, corpus, settings, timings, gap, facts, first=1, last=last)
    print("\n" + terminal_table(report))
    for name, value in report.gap.items():
        print(f"{name:<48} {value:.4f}")
    write_json(report, run_dir / "report.json")
    print(f"\nreport: {write_html(report, run_dir / 'report.html')}")
    return report


class EmbeddedServers:
    """Broker and registry of the demo; MLflow comes up while tier 1 trains."""

    def __init__(self, run_dir: Path):
        # The port is chosen now, because configurations name it before the server is up.
        self._mlflow = EmbeddedMlflow(run_dir / "mlflow", port=_free_port())
        self._broker = bootstrap_servers(run_dir / "broker")
        self._failure: BaseException | None = None

    def __enter__(self) -> EmbeddedServers:
        self.bootstrap = self._broker.__enter__()
        self._thread = threading.Thread(target=self._start)
        self._thread.start()
        return self

    def _start(self) -> None:
        try:
            self._mlflow.start()
        except BaseException as error:  # told to whoever waits
            self._failure = error

    @property
    def registry(self) -> str:
        return self._mlflow.uri

    def wait(self) -> None:
        """Wait until MLflow answers."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def __exit__(self, *exception: object) -> None:
        self._thread.join()
        self._mlflow.stop()
        self._broker.__exit__(None, None, None)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _prepare(target: Path, data: Path | None, settings: DemoSettings) -> Corpus:
    if data is None:
        return plays.prepare(target, settings.seed, n_devices=settings.n_devices)
    return plays.prepare_from_files(data, target, settings.seed, seq_len=settings.seq_len)


def _configure(run_dir: Path, corpus: Corpus, settings: DemoSettings, servers: EmbeddedServers) -> tuple[Path, Path]:
    config, late = write_tier1(run_dir, corpus, settings, bootstrap=servers.bootstrap, registry=servers.registry)
    return late, config


def _bootstrap(config: Path, servers: EmbeddedServers, approver: Approver) -> None:
    from workflows.broadcast import broadcast
    from workflows.core_update import core_update
    from workflows.evaluate_and_promote import evaluate_and_promote

    candidate = core_update(config=str(config), run="bootstrap")
    servers.wait()
    with answer_gates(approver):
        outcome = evaluate_and_promote(config=str(config), candidate=candidate.digest)
    if outcome.verdict != "approved":
        raise FednestedError(f"the first version was not approved ({outcome.verdict}): {outcome.reason}")
    broadcast(config=str(config))


def _nested_round(config: Path, approver: Approver) -> None:
    from workflows.nested_round import nested_round

    with arrivals(config), answer_gates(approver):
        result = nested_round(config=str(config))
    print(
        f"   {result.outcome.verdict}: champion is version {result.outcome.champion}; "
        f"devices can fetch version {result.published.version}"
    )


class _late_core_update:
    """A core update in a process of its own, started with round 1 and folded by nobody until the rounds are over."""

    def __init__(self, config: Path, run_dir: Path):
        self._command = [sys.executable, "-m", "flytekit.clis.sdk_in_container.pyflyte", "run"]
        self._command += ["workflows/core_update.py", "core_update", "--config", str(config), "--run", "late"]
        self._log = run_dir / "late_core_update.log"

    def __enter__(self) -> _late_core_update:
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", "5", *self._command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ,
            )
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is not None:
            self._process.terminate()
        if self._process.wait() != 0 and kind is None:
            raise FednestedError(f"the late core update failed: see {self._log}")


def _settle_late(config: Path, approver: Approver) -> None:
    from workflows.broadcast import broadcast
    from workflows.evaluate_and_promote import evaluate_and_promote

    with answer_gates(approver):
        outcome = evaluate_and_promote(config=str(config))
    broadcast(config=str(config))
    print(f"   {outcome.verdict}: version {outcome.version}, champion is version {outcome.champion} {outcome.reason}")


def _end_of_federation(config: Path) -> None:
    from fednested_lib.events import FederationEnd

    fed = open_federation(config)
    state = fed.chain.state()
    fed.announce(FederationEnd(federation=state.federation, chain_seq=state.seq), key=b"end")
    fed.close()


def _prove(config: Path) -> dict[str, str]:
    from tier1.loops.replay import replay_versions, verify_all

    fed = open_federation(config)
    lines = [*replay_versions(fed), *verify_all(fed)]
    for line in lines:
        print(f"   {line}")
    state = fed.chain.state()
    fed.close()
    return {"head of the chain": state.digest, **{line.split(":")[0]: line.split(":", 1)[1].strip() for line in lines}}


def _gap(config: Path, corpus: Corpus, settings: DemoSettings, last: int) -> dict[str, float]:
    from tier1.loops.gate_candidate import losses_of

    fed = open_federation(config)
    state = fed.chain.state()
    snapshot = fed.home / "first_snapshot.json"
    snapshot.write_bytes(state.versions[1].snapshot.to_json())
    heldout = {f"device-{client}": str(corpus.suites[f"device-{client}"]) for client in sorted(corpus.devices)}
    results = run_all(
        {
            "snapshot_path": str(snapshot),
            "blobs": str(fed.home / "blobs"),
            "train": [str(corpus.devices[client]) for client in sorted(corpus.devices)],
            "heldout": heldout,
            "steps": settings.rounds * settings.local_steps,
            "batch_size": settings.local_batch * len(corpus.devices),
            "seq_len": settings.seq_len,
            "rank": settings.rank,
            "alpha": settings.alpha,
            "seed": settings.seed,
            "max_tokens": settings.suite_tokens,
        }
    )

    def mean(losses: dict[str, float]) -> float:
        return sum(losses[name] for name in heldout) / len(heldout)

    best_rate, best = min(((rate, mean(losses)) for rate, losses in results.items()), key=lambda pair: pair[1])
    first, champion = (mean(losses_of(fed, state.versions[number])) for number in (1, last))
    return {
        "device loss of the first snapshot": first,
        "device loss of the last champion of the rounds": champion,
        f"device loss of centralised LoRA (rate {best_rate:g})": best,
        "gap closed": (first - champion) / (first - best),
    }


def _report(
    config: Path,
    corpus: Corpus,
    settings: DemoSettings,
    timings: Timings,
    gap: dict[str, float],
    facts: dict[str, str],
    *,
    first: int,
    last: int,
) -> DemoReport:
    from tier1.loops.gate_candidate import measure
    from tier1.versions.audit import audit

    fed = open_federation(config)
    state = fed.chain.state()
    rows, contributors, results = [], [], {}
    for number in sorted(state.versions):
        found = audit(fed.chain, number)
        results[number] = measure(fed, state.versions[number].snapshot)
        accepted = [row for row in found.rows if row.kind == "accepted"]
        dense = any(row.kind == "dense" for row in found.rows)
        contributors += [(number, row.who, row.sequence, row.staleness, row.weight) for row in accepted]
        rows.append(
            VersionRow(
                version=number,
                parent=found.parent_version,
                kind="genesis" if number == 0 else "core update" if dense else "devices",
                accepted=len(accepted) + dense,
                refused=sum(row.kind == "refused" for row in found.rows),
                staleness=tuple(sorted(row.staleness for row in accepted)),
                bytes_per_update=sum(row.payload_bytes for row in accepted) // max(1, len(accepted)),
                status=_status(found.standing),
                losses={name: result.nats_per_token for name, result in results[number].items()},
            )
        )
    suites = [f"device-{client}" for client in sorted(corpus.devices)]
    newest = state.champion.version
    bits = {name: (results[first][name].bits_per_byte, results[newest][name].bits_per_byte) for name in results[newest]}
    title = "fednested: a nested federation"
    report = DemoReport(
        title=f"{title} over Shakespeare" if "hamlet" in corpus.devices else title,
        versions=rows,
        contributors=contributors,
        device_suites=suites,
        bits_per_byte=bits,
        gap=gap,
        timings=timings.rows,
        facts=facts,
    )
    return replace(report, shortfall=shortfall(report, settings.rounds, first=first, last=last))


def _status(standing: tuple[str, ...]) -> str:
    return next((name for name in ("voided", "champion", "approved", "head") if name in standing), "start")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/demo", help="run directory; one of an earlier demo is replaced")
    parser.add_argument("--data", default=None, help="directory of *.jsonl files, one device each; default: the plays")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-baseline", action="store_true", help="skip the centralised yardstick")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _quiet() -> None:
    """Keep events out of the demo's output, and flytekit's chatter with them; let Ctrl-C be Python's again."""
    import logging
    import signal

    import structlog

    os.environ.setdefault("FLYTE_SDK_LOGGING_LEVEL", "40")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    import flytekit  # noqa: F401  its import takes over SIGINT and would end the process before servers are stopped

    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())

"""`fednested tier1 …`: the commands of a checkout for the loops and their records.

A loop runs as the same Flyte workflow that a cluster runs: `pyflyte run workflows/<loop>.py <loop>` in a process of its
own, from the checkout's root. What only reads the chain (replay, audit, status) runs here.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fednested_lib import errors
from fednested_lib.errors import ConfigError, ContractError, FednestedError
from tier1.config import load_tier1

if TYPE_CHECKING:
    from tier1.federation import Federation

ROOT = Path(__file__).resolve().parent.parent
GATED = ("evaluate_and_promote", "nested_round")
CONFIG = typer.Option(..., "--config", help="tier1.yaml")

app = typer.Typer(help="Loops and records of the data centre.", no_args_is_help=True)


def run_workflow(name: str, config: Path, *arguments: str, answer: str | None = None) -> None:
    """Run one workflow locally with `pyflyte run` and print its result; `answer` is typed at its decision gate.

    What pyflyte prints beside the result (events, traceback boxes) is shown with --debug, and where a person is asked.

    Raises:
        ConfigError: the configuration is wrong (found before a process is started).
        FednestedError: the workflow failed; of the class and with the message that its task raised.
    """
    load_tier1(config)
    command = [sys.executable, "-m", "flytekit.clis.sdk_in_container.pyflyte", "run", f"workflows/{name}.py", name]
    command += ["--config", str(config.resolve()), *arguments]
    typed = None if answer is None else answer + "\n"
    asks = name in GATED and answer is None and sys.stdin.isatty()
    shown = None if asks or "--debug" in sys.argv else subprocess.PIPE
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch) / "error.json"
        environment = {**os.environ, "FEDNESTED_ERROR_FILE": str(told)}
        if shown is not None:
            environment["COLUMNS"] = "1000"  # rich would wrap the last line
        finished = subprocess.run(
            command, cwd=ROOT, input=typed, stdout=shown, env=environment, text=True, errors="replace", check=False
        )
        last = next((line for line in reversed((finished.stdout or "").splitlines()) if line.strip()), "")
        if finished.returncode != 0:
            raise _failure(name, told, finished.returncode, last)
    if last:
        typer.echo(last)


def _failure(name: str, told: Path, code: int, last: str) -> FednestedError:
    """Return the error that a task of the workflow raised, else one with the last line that pyflyte printed."""
    if not told.exists():
        return FednestedError(
            f"workflow {name} ended with exit code {code}: {last or 'no output'}; the chain is intact, run it again "
            "with --debug to see all"
        )
    error = json.loads(told.read_text(encoding="utf-8"))
    kind = getattr(errors, error["type"])
    return kind(error["reason"], error["message"]) if issubclass(kind, ContractError) else kind(error["message"])


@app.command("init-config")
def init_config(
    directory: Path = typer.Option(Path("."), "--dir", help="Where to write; nothing is overwritten."),
) -> None:
    """Write tier1.yaml, policy.yaml and keys."""
    from tier1.workspace import create_workspace

    path = create_workspace(directory, datasets={"text": "data/train.jsonl"}, suites={"text": "data/heldout.jsonl"})
    typer.echo(
        f"wrote {path}: put your data at the paths under core.datasets and evaluation.suites, "
        "register devices under devices"
    )


@app.command("core-update")
def core_update(
    config: Path = CONFIG,
    run: str = typer.Option("", help="name; a run that was killed goes on under its own; default: a new one"),
) -> None:
    """Train core and experts on governed data and fold the delta into a candidate."""
    load_tier1(config)
    run = run or f"local-{_unique()}"
    typer.echo(f"run {run}: should it end early, give --run {run} to go on where it was", err=True)
    run_workflow("core_update", config, "--run", run)


def _unique() -> str:
    return f"{time.strftime('%Y%m%dt%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


@app.command("aggregate-experts")
def aggregate_experts(config: Path = CONFIG) -> None:
    """Fold a window of device updates into a candidate."""
    run_workflow("aggregate_experts", config)


@app.command("evaluate")
def evaluate(config: Path = CONFIG) -> None:
    """Settle the newest candidate: evaluation and automatic gate, without the person's decision."""
    from tier1.federation import open_federation
    from tier1.loops.evaluate_and_promote import newest_candidate, settle_candidate

    fed = open_federation(config)
    typer.echo(settle_candidate(fed, newest_candidate(fed)))


@app.command("promote")
def promote(
    config: Path = CONFIG,
    decision: str = typer.Option(
        None, help="approve or reject; asked for on the terminal if absent (local profile only)"
    ),
    key: Path = typer.Option(None, help="approver's key: the decision is sent as a signed token"),
    reason: str = typer.Option("", help="why; one line"),
) -> None:
    """Settle the newest candidate and decide on it."""
    if decision is None:
        return run_workflow("evaluate_and_promote", config)
    _require_local(config)
    candidate, answer = _answer_for_newest(config, decision, key, reason)
    about = ["--candidate", candidate] if candidate else []
    run_workflow("evaluate_and_promote", config, *about, *_by_flag(answer), answer=answer)


def _by_flag(answer: str | None) -> list[str]:
    return [] if answer is None else ["--channel", "flag"]


def _require_local(config: Path) -> None:
    if load_tier1(config).profile != "local":
        raise ConfigError(
            "--decision answers the gate by flag and is for profile: local; "
            "in production issue a token with `fednested approvals token`"
        )


def _answer_for_newest(config: Path, decision: str, key: Path | None, reason: str) -> tuple[str, str]:
    """Settle the newest candidate; return its digest (empty if none waits) and the answer about its version."""
    from tier1.federation import open_federation
    from tier1.loops.evaluate_and_promote import newest_candidate, settle_candidate

    fed = open_federation(config)
    settled = settle_candidate(fed, newest_candidate(fed))  # the workflow's own settling finds it done
    if key is None or settled.status != "head":
        return settled.candidate, f"{decision}: {reason}" if reason else decision
    return settled.candidate, issue_token(fed, settled.version, decision, key, reason)


@app.command("broadcast")
def broadcast(config: Path = CONFIG) -> None:
    """Publish the champion's snapshot and tell the devices."""
    run_workflow("broadcast", config)


@app.command("nested-round")
def nested_round(
    config: Path = CONFIG,
    core: bool = typer.Option(False, help="begin with a core update"),
    decision: str = typer.Option(None, help="approve or reject (local profile only)"),
) -> None:
    """Turn every loop once."""
    if decision is not None:
        _require_local(config)
    run_workflow("nested_round", config, *(["--core"] if core else []), *_by_flag(decision), answer=decision)


@app.command("request")
def request(
    config: Path = CONFIG,
    kind: str = typer.Option(..., help="what the trigger routes: core_update or aggregate"),
    any_kind: bool = typer.Option(False, "--any-kind", help="let --kind be another one, for a trigger with a --route"),
    task_id: str = typer.Option(None, help="one execution per id, however often it is requested; default: a new one"),
) -> None:
    """Ask the trigger to turn a loop on the cluster: a signed task on tasks.training."""
    from fednested_lib.events import TASK_KINDS, parse_event
    from fednested_lib.signing import canonical_json
    from tier1.federation import open_federation

    if kind not in TASK_KINDS and not any_kind:
        raise ConfigError(
            f"--kind must be one of {', '.join(TASK_KINDS)}, got {kind}: correct it, or give --any-kind if the trigger "
            "has a --route for it"
        )
    fed = open_federation(config)
    task_id = task_id or f"manual-{_unique()}"
    fields = {"event": "training_task", "federation": fed.config.federation, "task_id": task_id, "kind": kind}
    fed.request(parse_event(canonical_json(fields)))
    typer.echo(f"requested {kind} as task {task_id}")


@app.command("data-engine")
def data_engine(config: Path = CONFIG) -> None:
    """Look once at the devices' telemetry: one line per finding; those with a task are asked of the trigger."""
    from tier1.federation import open_federation
    from tier1.loops.data_engine import turn_engine

    report = turn_engine(open_federation(config), now=time.time())
    for finding in report.findings:
        typer.echo(finding)
    ignored = ", ".join(f"{count} {reason}" for reason, count in report.ignored.items()) or "none"
    if report.left_out:
        typer.echo(f"… and {report.left_out} more, none of them worse")
    found = len(report.findings) + report.left_out
    typer.echo(f"{found} findings from {report.counted} of {report.read} new records; ignored: {ignored}")


@app.command("replay")
def replay(
    config: Path = CONFIG,
    version: int = typer.Option(None, help="one version; all when absent"),
    first: int = typer.Option(None, "--from", help="the oldest version to compare"),
    last: int = typer.Option(None, "--to", help="the newest version to compare"),
) -> None:
    """Rebuild versions from genesis and the archived inputs, and compare every blob."""
    from tier1.federation import open_federation
    from tier1.loops.replay import replay_versions

    if version is not None:
        if (first, last) != (None, None):
            raise ConfigError(f"--version {version} and --from/--to exclude each other: give one of them")
        first = last = version
    for line in replay_versions(open_federation(config), first, last):
        typer.echo(line)


@app.command("audit")
def audit(
    config: Path = CONFIG,
    version: int = typer.Option(None, help="version number"),
    candidate: str = typer.Option(None, help="digest of a candidate, settled or not, as decks name it"),
) -> None:
    """Print who contributed what with which weight, and what was refused and why."""
    from tier1.federation import open_federation
    from tier1.loops.replay import audit_candidate, audit_version

    if (version is None) == (candidate is None):
        raise ConfigError("audit is of --version N or of --candidate DIGEST: give one of them")
    fed = open_federation(config)
    for line in audit_version(fed, version) if candidate is None else audit_candidate(fed, candidate):
        typer.echo(line)


@app.command("verify")
def verify(config: Path = CONFIG) -> None:
    """Re-read chain, anchor, archive, log and weights, and name the first thing that does not hold."""
    from tier1.federation import open_federation
    from tier1.loops.replay import verify_all

    for line in verify_all(open_federation(config)):
        typer.echo(line)


@app.command("accept-log")
def accept_log(
    config: Path = CONFIG,
    reason: str = typer.Option(..., help="why the lost records will not come back; one line"),
) -> None:
    """Go on with an update log that lost or re-used offsets, or with another one; devices send again."""
    from tier1.federation import open_federation
    from tier1.loops import accept_log as loop
    from tier1.versions.new_log import lost_text

    accepted = loop.accept_log(open_federation(config), reason)
    places = ", ".join(f"{partition}:{offset}" for partition, offset in sorted(accepted.offsets.items()))
    typer.echo(
        f"log generation {accepted.generation} ({accepted.log_id}) accepted: cuts of {accepted.topic} go on at "
        f"{places}; consumed and no longer in the log: {lost_text(accepted)}; devices are asked to send again; run "
        "`fednested tier1 broadcast` if the control topic was lost as well"
    )


@app.command("export")
def export(
    config: Path = CONFIG,
    out: Path = typer.Option(..., help="directory that is made"),
    version: int = typer.Option(None, help="which one; the champion when absent"),
    shard_gb: float = typer.Option(5.0, min=0.001, help="most gigabytes of one file"),
) -> None:
    """Write a version as transformers reads it: config.json, tokenizer.json and sharded safetensors."""
    from tier1.federation import open_federation
    from tier1.loops.export_version import export_version

    written = export_version(open_federation(config), out, version, shard_gb=shard_gb)
    typer.echo(f"version {written} written to {out}")


@app.command("status")
def status(config: Path = CONFIG) -> None:
    """Print the chain: head, champion, versions and what became of them."""
    from tier1.federation import open_federation
    from tier1.loops.replay import chain_lines

    for line in chain_lines(open_federation(config)):
        typer.echo(line)


@app.command("doctor")
def doctor(
    config: Path = CONFIG,
    longest_outage_h: float = typer.Option(168.0, min=0, help="hours that tier 1 may be down: bound of the retention"),
    project: str = typer.Option("", help="Flyte project; with it or --domain, Flyte is looked at too"),
    domain: str = typer.Option("", help="Flyte domain"),
    connector: str = typer.Option("", help="host:port of the connector service, to ask it what it serves"),
) -> None:
    """Look at everything a federation needs to turn, and say what to do; changes nothing. Exit code 1 if it is bad."""
    from tier1.doctor.examine import examine

    states = []
    findings = examine(config, longest_outage_h=longest_outage_h, project=project, domain=domain, connector=connector)
    for finding in findings:
        typer.echo(finding)
        states.append(finding.state)
    typer.echo(f"{len(states)} findings: {states.count('bad')} bad, {states.count('warning')} warnings")
    if "bad" in states:
        raise typer.Exit(1)


def issue_token(fed: Federation, version: int, verdict: str, key: Path, reason: str) -> str:
    """Sign a decision about one version.

    Raises:
        ConfigError: the key is no registered approver's.
        GovernanceError: no such version, or a verdict or reason out of bounds.
    """
    from fednested_lib.signing import Signer
    from tier1.governance.approvals import issue
    from tier1.loops.evaluate_and_promote import manifest_of

    signer = Signer.load(key)
    approver = fed.config.governance.approvers.get(signer.public_key)
    if approver is None:
        raise ConfigError(
            f"key {key} ({signer.public_key[:12]}…) is no registered approver: add it under governance.approvers"
        )
    return issue(
        signer,
        verdict=verdict,
        manifest_digest=manifest_of(fed, version),
        approver=approver,
        issued_at=int(time.time()),
        reason=reason,
    )

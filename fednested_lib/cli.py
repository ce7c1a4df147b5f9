"""The `fednested` command: parse, load the configuration, call one function, print one result.

This module knows no tier-1 code. Command groups of a checkout (`tier1`, …) are found through the entry-point group
`fednested.commands`; in the wheel alone they answer with the remedy. An error of ours is one line on standard error and
its exit code; `--debug` shows the traceback.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import typer

from fednested_lib.errors import ConfigError, FednestedError

if TYPE_CHECKING:
    from fednested_lib.signing import Signer

ENTRY_POINTS = "fednested.commands"
CHECKOUT_GROUPS = ("tier1", "approvals", "gateway")
CHECKOUT_REMEDY = "needs a checkout of the repository: run `make setup` there and use its .venv/bin/fednested"

app = typer.Typer(
    name="fednested",
    help="Federated training of one Mixture-of-Experts model while the data stays where it is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
tier2 = typer.Typer(help="Commands of a device.", no_args_is_help=True)
messaging = typer.Typer(help="Topics of the update log.", no_args_is_help=True)
app.add_typer(tier2, name="tier2")
audit = typer.Typer(help="The device's own log of decisions.", no_args_is_help=True)
tier2.add_typer(audit, name="audit")
app.add_typer(messaging, name="messaging")


@app.callback()
def _root(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    """Federated training of one Mixture-of-Experts model while the data stays where it is."""


@app.command("init-config")
def init_config(
    profile: str = typer.Argument(help="tier1 or tier2"),
    directory: Path = typer.Option(Path("."), "--dir", help="Where to write; nothing is overwritten."),
    client_id: str = typer.Option("device-1", help="tier2: name of this device."),
) -> None:
    """Write an example configuration, a signed policy and fresh keys."""
    if profile == "tier2":
        typer.echo(_init_tier2(directory, client_id))
    elif profile == "tier1":
        _checkout_app("tier1")(args=["init-config", "--dir", str(directory)], standalone_mode=False)
    else:
        raise ConfigError(f"profile must be tier1 or tier2, got {profile}")


def _init_tier2(directory: Path, client_id: str) -> str:
    from fednested_lib.blobs import create_exclusive
    from fednested_lib.config import TIER2_EXAMPLE
    from fednested_lib.policy import EXAMPLE, sign_policy

    path, policy = directory / "tier2.yaml", directory / "policy.yaml"
    if path.exists():
        raise ConfigError(f"{path} exists already: move it away or choose another --dir")
    signer, site = _key(directory / "device.key"), _key(directory / "site-policy.key")
    if create_exclusive(policy, EXAMPLE.format(federation="fednested").encode()):
        sign_policy(policy, site)
    if not create_exclusive(path, TIER2_EXAMPLE.format(client_id=client_id, policy_key=site.public_key).encode()):
        raise ConfigError(f"{path} exists already: move it away or choose another --dir")
    return (
        f"wrote {path}; register client {client_id} at tier 1 with public key {signer.public_key}\n"
        f"wrote and signed {policy}: what may leave; {directory / 'site-policy.key'} signs changes of it and belongs "
        "to whoever answers for the site's data: move it off this device"
    )


def _key(path: Path) -> Signer:
    from fednested_lib.signing import Signer

    if path.exists():
        return Signer.load(path)
    signer = Signer.generate()
    signer.save(path)
    return signer


@tier2.command("run-client")
def run_client(config: Path = typer.Option(..., "--config", help="tier2.yaml")) -> None:
    """Run the device, as two processes, until the federation ends or it is told to stop."""
    from fednested_lib.config import load_tier2
    from fednested_lib.supervisor import supervise

    supervise(load_tier2(config), config, typer.echo)


@tier2.command("sidecar")
def sidecar(config: Path = typer.Option(..., "--config", help="tier2.yaml")) -> None:
    """Run the process that sends, and sees no data; for systemd (deploy/edge/)."""
    from fednested_lib.config import load_tier2
    from fednested_lib.processes import run_sidecar

    typer.echo(f"stopped: {run_sidecar(load_tier2(config))}")


@tier2.command("trainer")
def trainer(config: Path = typer.Option(..., "--config", help="tier2.yaml")) -> None:
    """Run the process that trains, and needs no network; for systemd (deploy/edge/)."""
    from fednested_lib.config import load_tier2
    from fednested_lib.processes import run_trainer

    run_trainer(load_tier2(config))


@tier2.command("forget-experts")
def forget_experts(config: Path = typer.Option(..., "--config", help="tier2.yaml")) -> None:
    """End the period of the chosen experts (`adapters.experts: auto`): the next update chooses anew."""
    from fednested_lib.config import load_tier2
    from fednested_lib.expert_choice import choice_path

    path = choice_path(load_tier2(config).home)
    existed = path.exists()
    path.unlink(missing_ok=True)
    typer.echo(f"removed {path}" if existed else f"nothing to forget: there is no {path}")


@tier2.command("doctor")
def doctor(config: Path = typer.Option(..., "--config", help="tier2.yaml")) -> None:
    """Look at everything this device needs, and say what to do; changes nothing. Exit code 1 if something is bad."""
    from fednested_lib.doctor import examine

    states = []
    for finding in examine(config):
        typer.echo(finding)
        states.append(finding.state)
    typer.echo(f"{len(states)} findings: {states.count('bad')} bad, {states.count('warning')} warnings")
    if "bad" in states:
        raise typer.Exit(1)


@tier2.command("sign-policy")
def sign_policy(
    policy: Path = typer.Argument(help="policy.yaml; its signature is written to policy.yaml.sig"),
    key: Path = typer.Option(..., "--key", help="the site's policy key"),
) -> None:
    """Check a policy and sign it, so that devices which pin this key obey it from their next start on."""
    from fednested_lib import policy as policies
    from fednested_lib.signing import Signer

    signed = policies.sign_policy(policy, Signer.load(key))
    typer.echo(f"signed version {signed.version} of {policy} for federation {signed.federation}")


@audit.command("verify")
def verify_audit(
    config: Path = typer.Option(..., "--config", help="tier2.yaml"),
    key: Path | None = typer.Option(
        None, "--key", help="first.key, if it was carried away; default: beside the anchor"
    ),
    noted: str | None = typer.Option(None, "--anchor", help="COUNT:MAC as this command printed it earlier"),
) -> None:
    """Check that the audit log was not edited, re-ordered or shortened, and print its anchor."""
    from fednested_lib.audit import parse_anchor, verify_audit
    from fednested_lib.config import load_tier2
    from fednested_lib.sidecar import audit_places

    log, anchor = audit_places(load_tier2(config))
    typer.echo(str(verify_audit(log, anchor=anchor, first_key=key, noted=noted and parse_anchor(noted))))


@tier2.command("outbox")
def outbox(config: Path = typer.Option(..., "--config", help="tier2.yaml")) -> None:
    """List what waits in the outbox, what is not settled, and what was refused for good."""
    import time

    from fednested_lib.config import load_tier2
    from fednested_lib.outbox_survey import read_survey

    typer.echo(read_survey(load_tier2(config).home / "outbox").describe(now=time.time()))


@tier2.command("export-peft")
def export_peft(
    sequence: int = typer.Argument(help="number of an update that tier 1 has not settled yet"),
    config: Path = typer.Option(..., "--config", help="tier2.yaml"),
    directory: Path = typer.Option(..., "--to", help="directory to write; peft opens it beside the base model"),
) -> None:
    """Write an update as it leaves this device as a peft adapter, to look at; the device must be stopped."""
    from fednested_lib.config import load_tier2
    from fednested_lib.peft_export import export_update

    envelope = export_update(load_tier2(config), sequence, directory)
    typer.echo(
        f"wrote {directory}: update {sequence}, {envelope.encoding}, rank {envelope.adapter.rank}, of version "
        f"{envelope.base_version}"
    )


@messaging.command("bootstrap-topics")
def bootstrap_topics(
    bootstrap: str = typer.Option("127.0.0.1:9092", envvar="FEDNESTED_KAFKA_BOOTSTRAP", help="host:port of the broker"),
) -> None:
    """Create the topics that are missing."""
    from fednested_lib.log import TOPICS, KafkaLog

    log = KafkaLog(bootstrap)
    try:
        log.create_topics(TOPICS)
    finally:
        log.close()
    typer.echo(f"topics ready at {bootstrap}: {', '.join(TOPICS)}")


def _checkout_app(name: str) -> typer.Typer:
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            return entry.load()
    raise ConfigError(f"`fednested {name}` {CHECKOUT_REMEDY}")


def _add_checkout_groups(arguments: list[str]) -> None:
    """Add the groups of a checkout; only the one that is called is imported, so that a device starts fast."""
    if arguments[:1] == ["tier2"]:  # nor does a device look through what is installed on it
        return
    from importlib.metadata import entry_points

    registered = {entry.name for entry in entry_points(group=ENTRY_POINTS)}
    for name in sorted(registered | set(CHECKOUT_GROUPS)):
        if name in registered and name in arguments:
            app.add_typer(_checkout_app(name), name=name)
        elif name in registered:
            app.add_typer(typer.Typer(help=f"Commands of this checkout: `fednested {name} --help`."), name=name)
        else:
            _add_remedy(name)


def _add_remedy(name: str) -> None:
    # A command, not a group: whatever follows the name is swallowed, so the remedy is the only thing that is said.
    settings = {"ignore_unknown_options": True, "allow_extra_args": True}

    @app.command(name, help=f"Not in the wheel: {CHECKOUT_REMEDY}.", context_settings=settings)
    def _explain(context: typer.Context) -> None:
        raise ConfigError(f"`fednested {name}` {CHECKOUT_REMEDY}")


def _load_when_used(name: str) -> None:
    """Let a module stand for itself until something of it is asked for.

    structlog and confluent-kafka load asyncio, 3 MB, for asynchronous faces that nothing here uses. importlib's
    LazyLoader does not help: the import statement itself touches the module, which loads it.
    """
    if name in sys.modules:
        return
    stand_in = ModuleType(name)

    def load(attribute: str) -> object:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
        return getattr(import_module(name), attribute)

    stand_in.__getattr__ = load
    sys.modules[name] = stand_in


def _configure_logging() -> None:
    import logging

    terminal = sys.stderr.isatty()
    if not terminal:  # a service: for its colours structlog would load rich, 6 MB
        sys.modules["rich"] = None
        _load_when_used("asyncio")
    import structlog

    if not terminal:
        del sys.modules["rich"]
    renderer = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )


def _fail(line: str, code: int) -> None:
    supervisor = os.environ.get("FEDNESTED_LAST_WORDS")  # it says it, when both processes have ended
    if supervisor:
        os.write(int(supervisor), line.encode()[:4096])
    else:
        sys.stderr.write(f"fednested: {line}\n")
    raise SystemExit(code)


def main() -> None:
    """Entry point of the console script."""
    if not (3, 10) <= sys.version_info[:2] < (3, 13):
        found = ".".join(map(str, sys.version_info[:3]))
        _fail(f"Python must be 3.10 to 3.12, got {found}: make an environment with python3.11", 2)
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        _configure_logging()
        _add_checkout_groups(arguments)
        app()
    except FednestedError as error:
        if debug:
            raise
        _fail(str(error).replace("\n", " "), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing is lost, run the same command again", 130)


if __name__ == "__main__":
    main()

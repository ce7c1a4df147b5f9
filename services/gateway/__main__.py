"""`python -m services.gateway`, `fednested gateway`: run the gateway until SIGTERM or Ctrl-C."""

from __future__ import annotations

from pathlib import Path

import structlog
import typer

from services.gateway.server import Limits, make_server, open_gateway, serve
from services.shell import run_as_process

DEFAULT = Limits()
app = typer.Typer(help="The door for devices that speak HTTP.")


@app.callback(invoke_without_command=True)
def run(
    config: Path = typer.Option(..., help="tier1.yaml: the log, the home, the federation's name and its devices."),
    host: str = typer.Option("127.0.0.1", help="Where to listen; behind a reverse proxy leave it."),
    port: int = typer.Option(8090, min=0, max=65535, help="0 takes a free one."),
    cert_file: Path = typer.Option(None, help="PEM certificate chain: speak TLS."),
    key_file: Path = typer.Option(None, help="Its key."),
    client_ca_file: Path = typer.Option(None, help="Ask every device for a certificate that this one vouches for."),
    requests_per_s: float = typer.Option(DEFAULT.requests_per_s, min=0.01, help="Of one device, in the long run."),
    burst: int = typer.Option(DEFAULT.burst, min=1, help="Of one device, at once."),
    polls_per_s: float = typer.Option(DEFAULT.polls_per_s, min=0.01, help="Looks of all devices that are aimed at."),
    min_poll_s: float = typer.Option(DEFAULT.min_poll_s, min=0, help="Shortest wait that a device is asked for."),
    max_payload_mib: int = typer.Option(DEFAULT.max_payload_bytes >> 20, min=1, max=1024, help="Largest payload."),
) -> None:
    """Serve the devices of one federation."""
    from tier1.federation import open_federation

    limits = Limits(
        requests_per_s=requests_per_s,
        burst=burst,
        polls_per_s=polls_per_s,
        min_poll_s=min_poll_s,
        max_payload_bytes=max_payload_mib << 20,
    )
    fed = open_federation(config)
    try:
        with open_gateway(fed, limits) as application:
            tls = {"cert_file": cert_file, "key_file": key_file, "client_ca_file": client_ca_file}
            server = make_server(application, host=host, port=port, **tls)
            structlog.get_logger().info("gateway.started", host=host, port=port, tls=cert_file is not None)
            serve(server)
    finally:
        fed.close()


def main() -> None:
    """Parse the command line and serve."""
    run_as_process("gateway", lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()

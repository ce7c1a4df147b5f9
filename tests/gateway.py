"""A gateway in this process, on loopback, over any log."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from starlette.applications import Starlette

from fednested_lib.blobs import BlobStore
from fednested_lib.gateway_http import GatewayHttp
from fednested_lib.log import UpdateLog
from fednested_lib.signing import Signer
from services.gateway.admit import Buckets
from services.gateway.app import Gateway
from services.gateway.places import Places
from services.gateway.server import make_server
from services.gateway.uploads import Uploads
from tier1.config import DeviceRecord

DEVICE = Signer.from_seed(b"g" * 32)
CLIENT = "romeo"
DEVICES = {CLIENT: DeviceRecord(public_key=DEVICE.public_key)}


class Anything(Mapping, Container):
    """Checks that let every record through, and topics that all may be read."""

    def __getitem__(self, topic: str):
        return lambda record, client_id: None

    def __contains__(self, topic: object) -> bool:
        return True

    def __iter__(self):
        return iter(())

    def __len__(self) -> int:
        return 0


@contextmanager
def serving(app: Starlette, **tls: Path) -> Iterator[str]:
    """Serve `app` on a free port and yield its URL."""
    server = make_server(app, host="127.0.0.1", port=0, **tls)
    socket = server.config.bind_socket()
    socket.listen(64)  # who connects before the thread runs waits in the queue
    thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://localhost:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        socket.close()


def make_gateway(directory: Path, log: UpdateLog, *, checks=None, readable=None, **options) -> Gateway:
    """Make a gateway whose stores lie in `directory`; it lets everything through unless it is told otherwise."""
    directory.mkdir(exist_ok=True)
    return Gateway(
        log,
        blobs=BlobStore(directory / "blobs"),
        uploads=Uploads(directory / "uploads", BlobStore(directory / "payloads"), max_bytes=1 << 20),
        places=Places(directory / "places.db", log),
        devices=DEVICES,
        checks=Anything() if checks is None else checks,
        readable=Anything() if readable is None else readable,
        **{"buckets": Buckets(1e6, 1_000_000), **options},
    )


def connect(url: str, signer: Signer = DEVICE, client_id: str = CLIENT, **options) -> GatewayHttp:
    """Speak to a gateway as the registered device."""
    return GatewayHttp(url, client_id=client_id, signer=signer, **{"timeout_s": 20.0, **options})

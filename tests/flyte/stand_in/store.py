"""The object store: HTTP with signed URLs for clients, plain files for pods.

PUT http://127.0.0.1:<port>/<path>?signature=…   ==   <root>/<path>
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import secrets
import threading
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

MAX_BYTES = 64 << 20


class Store:
    """Serves the files below a directory to whoever has a signed URL.

    Args:
        root: where the files are.
    """

    def __init__(self, root: Path):
        self.root = root
        self._key = secrets.token_bytes(32)
        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def native(self, path: str) -> str:
        """Return the address of a file for pods; a plain path, because flytekit takes `file://` for no file."""
        return str(self.root / path)

    def signed(self, method: str, path: str) -> str:
        """Return a URL that allows one method on one path."""
        port = self._httpd.server_address[1]
        return f"http://127.0.0.1:{port}/{quote(path)}?signature={self._signature(method, path)}"

    def allows(self, method: str, path: str, signature: str) -> bool:
        """Tell whether a signature is for this method and path."""
        return hmac.compare_digest(self._signature(method, path), signature)

    def close(self) -> None:
        """Stop serving."""
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def _signature(self, method: str, path: str) -> str:
        return hmac.new(self._key, f"{method} {path}".encode(), hashlib.sha256).hexdigest()


def _handler(store: Store) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def do_PUT(self) -> None:
            body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), MAX_BYTES))
            target = self._target("PUT")
            if target is None:
                self._answer(403)
                return
            wanted = self.headers.get("Content-MD5")
            if wanted and wanted != base64.b64encode(hashlib.md5(body).digest()).decode():
                self._answer(400)
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(body)
            self._answer(200)

        def do_GET(self) -> None:
            target = self._target("GET")
            if target is None:
                self._answer(403)
            elif target.is_file():
                self._answer(200, target.read_bytes())
            else:
                self._answer(404)

        def _target(self, method: str) -> Path | None:
            url = urlsplit(self.path)
            path = unquote(url.path).lstrip("/")
            signature = parse_qs(url.query).get("signature", [""])[0]
            return store.root / path if store.allows(method, path, signature) else None

        def _answer(self, status: int, body: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler

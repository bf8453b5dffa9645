"""Serving the page to browsers on this machine.

Two headers of a response (COOP and COEP) let a browser share memory between threads; opened as a file, or served
without them, the page computes on one thread. The content security policy lets nothing be loaded from elsewhere.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from visionattn.errors import InputError, shorten

__all__ = ["DIGITS", "PAGE", "PageServer", "demo"]

PAGE = Path(__file__).parent / "page"
"""Folder of the built page."""
DIGITS = Path(__file__).parent / "digits.safetensors"
"""Weights of the transformer that reads digits there (see digits.md beside it)."""

HOST = "127.0.0.1"
LARGEST_PORT = 2**16 - 1
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' blob: data:; "
    "worker-src 'self' blob:; connect-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # ask whether a file has changed: a page that is built anew is seen at once
}
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".onnx": "application/octet-stream",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",  # compiled while it is loaded only under this type
    ".webmanifest": "application/manifest+json",
}


class _Handler(SimpleHTTPRequestHandler):
    """Files of one folder, and nothing else."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    timeout = 60  # seconds after which a connection that says nothing is closed
    extensions_map = TYPES
    server_version, sys_version = "visionattn", ""

    def translate_path(self, path: str) -> str:
        """The file of a request; a name that no file has for what lies outside of the folder, by `..` or by a link."""
        try:
            found = Path(super().translate_path(path)).resolve()
            inside = found.is_relative_to(Path(self.directory).resolve())
        except (OSError, ValueError, RuntimeError):  # a NUL in the path, a loop of links
            inside = False
        return str(found) if inside else str(Path(self.directory) / "no such file")

    def list_directory(self, path: Any) -> None:
        """Folders are not shown."""
        self.send_error(HTTPStatus.NOT_FOUND)

    def end_headers(self) -> None:
        """Add the headers that every response has."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not reported."""


class PageServer(ThreadingHTTPServer):
    """A server of the page for this machine alone, in a `with` block.

    Args:
        port: 0 takes any that is free.
        page: Folder of a built page. Default: the one of this installation.

    Attributes:
        url: What to open.

    Raises:
        InputError: The page is not built, or the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, port: int = 8000, page: str | Path | None = None) -> None:
        page = Path(page or PAGE)
        if not (page / "index.html").is_file():
            raise InputError(
                "The page is not in this installation: in a checkout, `make web` builds it, with Node 20 or newer."
            )
        if not isinstance(port, int) or not 0 <= port <= LARGEST_PORT:
            raise InputError(f"The port must be a whole number from 0 to {LARGEST_PORT}; got {shorten(port)}.")

        def handler(*args: Any) -> _Handler:
            return _Handler(*args, directory=str(page))

        try:
            super().__init__((HOST, port), handler)
        except OSError as error:
            taken = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise InputError(
                f"The port {port} {taken}. Choose another by --port N (port=N), or --port 0 for any that is free."
            ) from error
        self.url = f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes its connection early is no fault."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def demo(port: int = 8000, tell: Callable[[str], None] = print) -> None:
    """Serve the page to browsers on this machine, until Ctrl-C.

    Args:
        port: 0 takes any that is free.
        tell: Called with a line that says what to open.

    Raises:
        InputError: The page is not built, or the port cannot be used.
    """
    with PageServer(port) as server:
        tell(f"Open {server.url} in a browser on this machine; Ctrl-C ends the server.")
        server.serve_forever()

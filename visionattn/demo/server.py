"""Serve the page to browsers on this machine.

Two response headers (COOP and COEP) let a browser share memory between threads; opened as a file, or served without
them, the page runs on one thread. The content security policy blocks requests to other hosts.
"""

from __future__ import annotations

import errno
import lzma
import os
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

from visionattn.errors import InputError, shorten

__all__ = ["DIGITS", "PAGE", "PageServer", "demo"]

PAGE = Path(__file__).parent / "page"
"""Folder of the built page."""
DIGITS = Path(__file__).parent / "digits.safetensors"
"""Weights of the page's digit classifier (see digits.md next to it)."""
WEIGHTS = Path(__file__).parents[1] / "weights"
"""Folder of the package's weights; models of the page read some of them."""

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
    "Cache-Control": "no-cache",  # revalidate files, so that a rebuilt page is shown at once
}
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".onnx": "application/octet-stream",
    ".png": "image/png",
    ".safetensors": "application/octet-stream",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",  # compiled while it is loaded only under this type
    ".webmanifest": "application/manifest+json",
}


class _Handler(SimpleHTTPRequestHandler):
    """Files of the page and weights of the package, and nothing else."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    timeout = 60  # seconds after which an idle connection is closed
    extensions_map = TYPES
    server_version, sys_version = "visionattn", ""

    def translate_path(self, path: str) -> str:
        """The file of a request: of the folder, or weights of the package.

        For paths outside of the folder, by `..` or by a link, it is a name that does not exist.
        """
        try:
            found = Path(super().translate_path(path)).resolve()
            inside = found.is_relative_to(Path(self.directory).resolve())
            # A wheel contains the weights once, in the package.
            if inside and found.suffix == ".safetensors" and not found.exists():
                found = WEIGHTS / found.name
        except (OSError, ValueError, RuntimeError):  # a NUL in the path, a loop of links
            inside = False
        return str(found) if inside else str(Path(self.directory) / "no such file")

    def send_head(self) -> Any:
        """Send the headers of a file. If only FILE.xz exists, as in a wheel, the file is its decompressed content."""
        path = self.translate_path(self.path)
        compressed = f"{path}.xz"
        if os.path.exists(path) or not os.path.isfile(compressed):  # pathlib raises for names that are too long
            return super().send_head()
        content = lzma.decompress(Path(compressed).read_bytes())
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return BytesIO(content)

    def list_directory(self, path: Any) -> None:
        """Refuse to list folders."""
        self.send_error(HTTPStatus.NOT_FOUND)

    def end_headers(self) -> None:
        """Add the headers that every response has."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests."""


class PageServer(ThreadingHTTPServer):
    """A server of the page for this machine only; use it in a `with` block.

    Args:
        port: Port, 0 for any free one.
        page: Folder of a built page. Default: that of this installation.

    Attributes:
        url: Address of the page.

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
                f"The port {port} {taken}. Choose another with --port N (port=N), or --port 0 for any free one."
            ) from error
        self.url = f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore browsers that close a connection early."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def demo(port: int = 8000, tell: Callable[[str], None] = print) -> None:
    """Serve the page to browsers on this machine, until Ctrl-C.

    Args:
        port: Port, 0 for any free one.
        tell: Called with a line that contains the address.

    Raises:
        InputError: The page is not built, or the port cannot be used.
    """
    with PageServer(port) as server:
        tell(f"Open {server.url} in a browser on this machine; Ctrl-C ends the server.")
        server.serve_forever()

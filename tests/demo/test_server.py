"""The server of the page: its headers, what it does not give, whom it answers."""

import http.client
import lzma
import socket
import threading
from pathlib import Path

import pytest

import visionattn
from visionattn.demo import PageServer
from visionattn.errors import InputError

SPAN = Path(visionattn.__file__).parent / "weights/va_span_ch26_x4.safetensors"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("site")
    (root / "secret.txt").write_text("secret")
    page = root / "page"
    (page / "models").mkdir(parents=True)
    (page / "index.html").write_text("<!doctype html><title>page</title>")
    (page / "worker.mjs").write_text("export {}")
    (page / "runtime.wasm").write_bytes(b"\0asm")
    (page / "compressed.wasm.xz").write_bytes(lzma.compress(b"\0asm" * 1000))
    (page / "models/span.onnx").write_bytes(b"model")
    (page / "models/own.safetensors").write_bytes(b"own")
    (page / "link.txt").symlink_to(root / "secret.txt")
    return page


@pytest.fixture(scope="module")
def server(page):
    with PageServer(0, page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, method="GET"):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.putrequest(method, path)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


@pytest.mark.parametrize(
    ("path", "type_", "body"),
    [
        ("/", "text/html; charset=utf-8", b"<!doctype html><title>page</title>"),
        ("/worker.mjs", "text/javascript; charset=utf-8", b"export {}"),
        ("/runtime.wasm", "application/wasm", b"\0asm"),
        ("/compressed.wasm", "application/wasm", b"\0asm" * 1000),
        ("/models/span.onnx?again", "application/octet-stream", b"model"),
        ("/models/own.safetensors", "application/octet-stream", b"own"),
        ("/models/va_span_ch26_x4.safetensors", "application/octet-stream", SPAN.read_bytes()),
    ],
)
def test_files_have_the_types_and_headers_that_threads_need(server, path, type_, body):
    response, found = ask(server, path)
    assert (response.status, found) == (200, body)
    assert response.headers["Content-Type"] == type_
    assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'self'" in response.headers["Content-Security-Policy"]
    assert response.headers["Server"].strip() == "visionattn"


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/models/..%2f..%2fsecret.txt",
        "/..%5csecret.txt",
        "//../secret.txt",
        "/%00",
        "/models%00/../../secret.txt",
        "/link.txt",
        "/models/",
        "/absent",
        "/models/absent.safetensors",
        "/models/../../weights/span.py",
        "/" + "a" * 5000,
    ],
)
def test_nothing_else_is_given(server, path):
    response, body = ask(server, path)
    assert response.status == 404
    assert b"secret" not in body
    assert b"span" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_is_taken(server, method):
    assert ask(server, "/", method)[0].status == 501


def test_an_unchanged_file_is_not_sent_again(server):
    changed = ask(server, "/runtime.wasm")[0].headers["Last-Modified"]
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request("GET", "/runtime.wasm", headers={"If-Modified-Since": changed})
    assert connection.getresponse().status == 304
    connection.close()


def test_it_listens_on_this_machine_alone(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"


def test_a_client_that_goes_away_is_no_fault(server, capsys):
    for _ in range(3):
        with socket.create_connection(server.server_address) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(b"GET /runtime.wasm HTTP/1.1\r\n")
    assert ask(server, "/")[0].status == 200
    assert capsys.readouterr().err == ""


def test_mistakes(server, tmp_path, page):
    with pytest.raises(InputError, match="`make web` builds it"):
        PageServer(0, tmp_path)
    with pytest.raises(InputError, match=r"The port \d+ is taken\. Choose another with --port N"):
        PageServer(server.server_address[1], page)
    for port in (-1, 70000, "x", None):
        with pytest.raises(InputError, match="must be a whole number from 0 to 65535"):
            PageServer(port, page)


def test_the_function_serves_until_it_is_interrupted(page, monkeypatch):
    monkeypatch.setattr("visionattn.demo.server.PAGE", page)
    lines = []

    def tell(line):
        lines.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        visionattn.demo(0, tell)
    assert lines[0].startswith("Open http://127.0.0.1:")

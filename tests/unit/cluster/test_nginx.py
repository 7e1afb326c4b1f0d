"""What `cluster/nginx.conf` bounds, with nginx itself before an application on loopback.

Only addresses, the certificate and the lengths of time are others than in the file.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from cluster.ports import free_port
from serve_app.api.app import create_app
from serve_app.config import IngressSettings
from tests.unit.api.fakes import FakeGateway, served

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed: its configuration was not tried")

CONFIGURATION = Path(__file__).parents[3] / "cluster" / "nginx.conf"
NAME = "images.example.org"
WAIT_S = 60
Start = Callable[..., int]
TLS = ssl.create_default_context()
TLS.check_hostname = False
TLS.verify_mode = ssl.CERT_NONE


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={NAME}", "-days", "2"]
    files = ["-keyout", "images.key", "-out", "images.crt"]
    subprocess.run([*command, *files], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def start(gateway: FakeGateway, tls: Path, tmp_path: Path) -> Iterator[Start]:
    """Start nginx before an application, with changes to its configuration; returns the port."""
    with ExitStack() as stack:
        url = stack.enter_context(served(create_app(gateway, IngressSettings(hosts=(NAME,)))))

        def started(**changes: str) -> int:
            port = free_port()
            changes |= {
                "listen 443": f"listen 127.0.0.1:{port}",
                "/etc/nginx/tls": str(tls),
                "127.0.0.1:8000": urlsplit(url).netloc,
            }
            stack.enter_context(running(changed(CONFIGURATION.read_text(), changes), tmp_path, port))
            return port

        yield started


def changed(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        text, count = re.subn(rf"{old}(\s+\d+s)?", new, text)
        assert count, f"nothing in the configuration says {old}"
    return text


@contextmanager
def running(server: str, folder: Path, port: int) -> Iterator[None]:
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"daemon off; pid {folder}/pid; error_log {folder}/errors; worker_processes 1; events {{}}"
    (folder / "nginx.conf").write_text(f"{main}\nhttp {{ access_log off; {temporary}\n{server}\n}}")
    assert NGINX is not None
    process = subprocess.Popen([NGINX, "-e", f"{folder}/errors", "-c", str(folder / "nginx.conf")])
    try:
        ends_at = time.monotonic() + WAIT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None, (folder / "errors").read_text()
                assert time.monotonic() < ends_at
                time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(WAIT_S)


def client(port: int) -> httpx.Client:
    return httpx.Client(
        base_url=f"https://127.0.0.1:{port}", headers={"host": NAME}, verify=False, timeout=WAIT_S, trust_env=False
    )


def connect(port: int) -> ssl.SSLSocket:
    return TLS.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S))


def is_open(caller: ssl.SSLSocket) -> bool:
    """Whether the other side still holds a connection, of which nothing is read."""
    try:
        caller.sendall(b"\r\n")
    except OSError:
        return False
    return True


def test_an_image_comes_through_and_a_stream_event_by_event(start: Start, gateway: FakeGateway) -> None:
    with client(start()) as nginx:
        assert nginx.post("/", json={"inputs": "a"}).headers["content-type"] == "image/jpeg"
        gateway.is_begun = gateway.is_stuck = True
        with nginx.stream("POST", "/v1/images/generations", json={"prompt": "a", "stream": True}) as reply:
            lines = reply.iter_lines()
            # The work is held: what comes now was not kept back.
            assert next(lines) == "event: image_generation.progress"
            gateway.release()
            assert "event: image_generation.completed" in lines


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        ("GET /", [f"x-a: {'a' * 9000}"], b"400"),
        ("GET /", [f"x-{index}: {'a' * 4000}" for index in range(12)], b"400"),
        (f"GET /{'a' * 9000}", [], b"414"),
        ("POST /v1/images/edits", [f"content-length: {32 * 1024**2 + 1}"], b"413"),
        ("GET /-/routes", [], b"404"),
        ("GET /%2d/routes", [], b"404"),
        ("GET //-/healthz", [], b"404"),
    ],
)
def test_what_is_too_large_or_serve_s_own_goes_no_further_than_nginx(
    start: Start, request_line: str, headers: list[str], status: bytes
) -> None:
    with connect(start()) as caller:
        caller.sendall("\r\n".join([f"{request_line} HTTP/1.1", f"host: {NAME}", *headers, "", ""]).encode())
        reply = caller.recv(4096)
    assert reply.split()[1] == status
    assert b"<html>" in reply, "the application answers in JSON"


@pytest.mark.parametrize(
    ("setting", "sent"),
    [
        ("client_header_timeout", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: "),
        ("client_body_timeout", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{"),
    ],
)
def test_who_sends_too_slowly_is_cut_off_and_nobody_behind_hears_of_it(
    start: Start, gateway: FakeGateway, setting: str, sent: bytes
) -> None:
    port = start(**{setting: f"{setting} 1s"})
    with connect(port) as caller:
        caller.sendall(sent)
        assert caller.recv(4096).split()[1:2] in ([], [b"408"])
    assert gateway.drafts == []


def test_who_takes_nothing_of_a_reply_is_cut_off(start: Start) -> None:
    port = start(send_timeout="send_timeout 1s", **{"rate=20r/s": "rate=10000r/s"})
    request = f"GET /openapi.json HTTP/1.1\r\nhost: {NAME}\r\n\r\n".encode()
    ends_at = time.monotonic() + WAIT_S
    with connect(port) as caller:
        # More replies than the buffers between take; none is read.
        caller.sendall(request * 400)
        while is_open(caller):
            assert time.monotonic() < ends_at
            time.sleep(0.05)


def test_one_address_has_so_many_connections_and_the_next_is_a_429(start: Start, gateway: FakeGateway) -> None:
    port = start()
    gateway.is_stuck = True
    body = b'{"inputs": "a"}'
    head = f"POST / HTTP/1.1\r\nhost: {NAME}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with ExitStack() as stack:
        for _ in range(32):
            stack.enter_context(connect(port)).sendall(head + body)
        ends_at = time.monotonic() + WAIT_S
        while len(gateway.drafts) < 32:
            assert time.monotonic() < ends_at
            time.sleep(0.02)
        with client(port) as nginx:
            assert nginx.get("/health").status_code == 429
        gateway.release()


def test_one_address_sends_so_many_requests_and_then_gets_429(start: Start) -> None:
    # So slow that nothing is refilled while the test runs.
    with client(start(**{"rate=20r/s": "rate=1r/m"})) as nginx:
        statuses = [nginx.get("/health").status_code for _ in range(50)]
    assert statuses[:41] == [200] * 41
    assert set(statuses[41:]) == {429}

"""What a connection may take of the proxy, on a real server of uvicorn's."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send
from uvicorn import config as uvicorn_config

from serve_app.deployments.front import connection
from serve_app.deployments.front.connection import (
    MAX_REQUESTS_AHEAD,
    MAX_UNREAD_BYTES,
    SlowReaderMiddleware,
    bound_connections,
)
from tests.unit.api.fakes import served

PIECE = b"a" * 65536


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Say how long the body was, or what the names of the headers are."""
    size_bytes, message = 0, await receive()
    while True:
        size_bytes += len(message.get("body", b""))
        if not message.get("more_body", False):
            break
        message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    names = b" ".join(name for name, _ in scope["headers"])
    await send({"type": "http.response.body", "body": names if scope["path"] == "/names" else b"%d" % size_bytes})


@pytest.fixture(scope="module")
def bounded_url() -> Iterator[str]:
    before = dict(uvicorn_config.HTTP_PROTOCOLS)
    bound_connections()
    with served(echo) as url:
        yield url
    uvicorn_config.HTTP_PROTOCOLS.update(before)


def connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 80), timeout=120)


@pytest.mark.parametrize("begun", [b"GET / HTTP/1.1\r\nhost: x\r\nx-a: ", b"GET /", b"GET / HTTP/1.1\r\n"])
def test_a_head_without_end_is_refused_long_before_it_is_gathered(bounded_url: str, begun: bytes) -> None:
    piece = PIECE if begun[-1:] != b"\n" else b"x-a: b\r\n" * 8192
    sent, raw = 0, b""
    with connected(bounded_url) as caller:
        with contextlib.suppress(ConnectionError):
            caller.sendall(begun)
            while sent < 100_000_000:
                caller.sendall(piece)
                sent += len(piece)
        with contextlib.suppress(ConnectionError):
            raw = caller.recv(65536)
    # What the kernel's buffers held beside what was read.
    assert sent < 50_000_000
    if raw:
        head, _, content = raw.partition(b"\r\n\r\n")
        assert b" 431 " in head
        assert json.loads(content)["code"] == "headers_too_large"


def test_bodies_and_further_requests_on_a_connection_are_not_counted_as_heads(bounded_url: str) -> None:
    with httpx.Client(trust_env=False) as client:
        for size_bytes in (10, MAX_UNREAD_BYTES * 3, 10, MAX_UNREAD_BYTES * 3):
            assert client.post(bounded_url, content=b"b" * size_bytes).text == str(size_bytes)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"0\r\nx-a: ", PIECE),
        (b"0\r\n", b"x-a: b\r\n" * 8192),
        (b"1;x=", PIECE),
    ],
    ids=["a trailer", "trailers", "an extension of a chunk"],
)
def test_what_stands_beside_a_body_is_cut_off_as_a_head_is(bounded_url: str, head: bytes, piece: bytes) -> None:
    sent = 0
    with connected(bounded_url) as caller, contextlib.suppress(ConnectionError):
        caller.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n" + head)
        while sent < 100_000_000:
            caller.sendall(piece)
            sent += len(piece)
    assert sent < 50_000_000


def test_a_trailer_is_no_header(bounded_url: str) -> None:
    chunked = b"host: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
    with connected(bounded_url) as caller:
        caller.sendall(b"POST /names HTTP/1.1\r\n" + chunked + b"authorization: Bearer x\r\n\r\n")
        reply = b"".join(iter(lambda: caller.recv(65536), b""))
    assert b"transfer-encoding" in reply.partition(b"\r\n\r\n")[2]
    assert b"authorization" not in reply


def test_requests_ahead_of_their_answers_are_few(bounded_url: str) -> None:
    one = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    with connected(bounded_url) as caller:
        caller.sendall(one * MAX_REQUESTS_AHEAD)
        replies = b""
        while replies.count(b"HTTP/1.1 200") < MAX_REQUESTS_AHEAD:
            replies += caller.recv(65536)
        with contextlib.suppress(ConnectionError):
            caller.sendall(one * 5000)
            while more := caller.recv(65536):
                replies += more
    assert replies.count(b"HTTP/1.1 200") < 5000


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nx-a: "])
def test_who_does_not_end_a_head_is_not_waited_for(
    bounded_url: str, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    with connected(bounded_url) as caller:
        caller.sendall(begun)
        assert caller.recv(65536).split()[1:2] == ([b"408"] if begun else [])


class Endless:
    """An application whose reply never ends, and which tells when it was stopped."""

    def __init__(self) -> None:
        self.was_stopped = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        finally:
            self.was_stopped.set()


def test_a_reader_that_stops_reading_ends_its_request() -> None:
    endless = Endless()
    with served(SlowReaderMiddleware(endless, patience_s=0.2)) as url, connected(url) as caller:
        caller.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert endless.was_stopped.wait(60)


async def test_a_reply_that_is_slow_to_come_is_nobody_s_fault() -> None:
    written: list[Message] = []

    async def send(message: Message) -> None:
        written.append(message)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        await SlowReaderMiddleware(slow, patience_s=60)({"type": "http"}, lambda: None, send)  # type: ignore[arg-type]

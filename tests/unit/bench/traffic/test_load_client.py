"""The load client against a real socket: what it sends, and how it takes every kind of answer."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serve_app.bench.measuring.options import BenchmarkRefused
from serve_app.bench.traffic.load import LoadOptions, run_load

FIRST = [{"id": "base", "parent": None}, {"id": "me/good", "parent": "base"}]
PAGES = {
    "/v1/models": {"data": FIRST, "has_more": True, "last_id": "me/good"},
    "/v1/models?after=me%2Fgood": {"data": [{"id": "me/busy", "parent": "base"}], "has_more": False, "last_id": ""},
    "/odd/v1/models": ["nothing of the kind"],
}


class Answers(BaseHTTPRequestHandler):
    """Lists two adapters; draws with one, and is always too busy for the other. Asks for a key."""

    received: list[dict[str, Any]]

    def do_GET(self) -> None:
        page = PAGES.get(self.path)
        self._reply(404 if page is None else 200, page)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.received.append(asked)
        adapter = asked["parameters"]["loras"][0]["id"]
        if self.headers["authorization"] != "Bearer sesame":
            self._reply(401, {"error": "a key is needed", "code": "unauthorized"})
        elif adapter == "me/busy":
            self._reply(429, {"error": "busy", "code": "overloaded"})
        elif adapter == "me/odd":
            self._reply(502, "a proxy's own page")
        else:
            self._reply(200, {}, {"server-timing": "queue;dur=3.0, fetch;dur=0.2, swap;dur=7.5, odd"})

    def _reply(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    # All of a run may come at once, to a server that had no turn for a while.
    request_queue_size = 128


@contextlib.contextmanager
def answering() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    received: list[dict[str, Any]] = []
    handler = type("Own", (Answers,), {"received": received})
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()


def test_known_adapters_are_asked_for_and_refusals_counted_by_their_code() -> None:
    told: list[float] = []
    with answering() as (url, received):
        options = LoadOptions(url, rate_per_s=200.0, max_requests=30, key="sesame", steps=5)
        report = run_load(options, on_progress=lambda share, text: told.append(share))
    assert {asked["parameters"]["loras"][0]["id"] for asked in received} == {"me/good", "me/busy"}
    assert len({asked["parameters"]["seed"] for asked in received}) == 30
    assert {asked["parameters"]["num_inference_steps"] for asked in received} == {5}
    assert report.answered + report.errors["overloaded"] == report.requests == 30
    assert report.mean_ms == {"queue": 3.0, "fetch": 0.2, "swap": 7.5}
    assert (report.swaps, report.fetches) == (1.0, 0.0)
    assert told[-1] == 1.0


FAILURES = [("me/good", None, "unauthorized"), ("me/odd", "sesame", "http_502")]


@pytest.mark.parametrize(("adapter", "key", "code"), FAILURES)
def test_a_failure_that_is_told_is_counted_as_such(adapter: str, key: str | None, code: str) -> None:
    with answering() as (url, _):
        report = run_load(LoadOptions(url, rate_per_s=200.0, max_requests=3, adapters=(adapter,), key=key))
    assert (report.answered, report.errors) == (0, {code: 3})


def test_a_service_that_is_away_is_counted_as_a_broken_connection() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nobody else gets the port, and nothing listens
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        report = run_load(LoadOptions(url, rate_per_s=200.0, max_requests=2, adapters=("me/good",)))
    assert report.errors == {"connection_ConnectError": 2}


@pytest.mark.parametrize(
    ("place", "said"),
    [("/elsewhere", "answered HTTP 404 when asked what it serves"), ("/odd", "is no Loraplex service")],
)
def test_what_is_no_such_service_is_refused_before_anything_is_sent(place: str, said: str) -> None:
    with answering() as (url, received), pytest.raises(BenchmarkRefused, match=said):
        run_load(LoadOptions(url + place, max_requests=1))
    assert received == []

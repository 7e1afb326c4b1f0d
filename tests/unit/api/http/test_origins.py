"""Web pages that make their visitors' browsers ask: foreign ones may neither draw nor change anything."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from serve_app.api.app import create_app
from serve_app.config import IngressSettings
from tests.access_matrix import MATRIX, request_of
from tests.unit.api.fakes import FakeGateway

ELSEWHERE = "http://blog.example"
CHANGES_OR_DRAWS = [route for route in MATRIX if route[0] not in ("GET", "HEAD")]


def request_from(client: TestClient, method: str, path: str, headers: dict[str, str]) -> Any:
    url, more = request_of(method, path, adapter="demo/sketch", model="demo/sdxl", image=b"no picture")
    return client.request(method, url, headers=headers, **more)


FOREIGN = [
    {"origin": ELSEWHERE, "sec-fetch-site": "cross-site"},
    {"origin": ELSEWHERE},
    {"origin": "null"},
    {"origin": "null", "sec-fetch-site": "cross-site"},
    {"origin": "http://testserver:8001", "sec-fetch-site": "same-site"},
    {"origin": "http://testserver:8001"},
    {"origin": "http://testserver.example"},
    {"origin": "http://["},
    {"origin": "http://[::1"},
    {"origin": "http://testserver@elsewhere.example"},
    {"sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize(("method", "path"), CHANGES_OR_DRAWS)
def test_a_foreign_page_can_neither_draw_nor_change_anything(
    client: TestClient, gateway: FakeGateway, method: str, path: str, headers: dict[str, str]
) -> None:
    reply = request_from(client, method, path, headers)
    assert reply.status_code == 403
    assert "ingress.cors_origins" in reply.text
    assert (gateway.drafts, gateway.registry.tokens) == ([], [])


OWN = [
    {},
    {"origin": "http://testserver"},
    {"origin": "https://testserver", "sec-fetch-site": "same-origin"},
    {"origin": "http://testserver:80", "sec-fetch-site": "same-origin"},
    {"origin": "https://behind-a-proxy.example", "sec-fetch-site": "same-origin"},
    {"sec-fetch-site": "none"},
]


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_own_pages_and_callers_without_a_browser_may(
    client: TestClient, gateway: FakeGateway, headers: dict[str, str]
) -> None:
    # What `curl -d` sends: JSON under the type of a form.
    form = {"content-type": "application/x-www-form-urlencoded", **headers}
    assert client.post("/", content=json.dumps({"inputs": "a cat"}), headers=form).status_code == 200
    assert len(gateway.drafts) == 1


def test_a_foreign_page_may_read_the_status_and_no_reply(client: TestClient) -> None:
    reply = client.get("/health", headers=FOREIGN[0])
    assert reply.status_code == 200
    assert "access-control-allow-origin" not in reply.headers


def test_pages_of_a_configured_origin_may_draw(gateway: FakeGateway) -> None:
    for origins in ((ELSEWHERE,), ("*",)):
        client = TestClient(create_app(gateway, IngressSettings(cors_origins=origins)))
        assert client.post("/", json={"inputs": "a"}, headers=FOREIGN[0]).status_code == 200
    client = TestClient(create_app(gateway, IngressSettings(cors_origins=(ELSEWHERE,))))
    assert client.post("/", json={"inputs": "a"}, headers={"origin": "http://other.example"}).status_code == 403


@pytest.mark.parametrize(
    "host", ["rebound.example", "rebound.example:8000", "127.0.0.1.nip.example", "localhost.example"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_service_on_loopback_answers_to_no_foreign_name(
    url: str, gateway: FakeGateway, host: str, method: str
) -> None:
    reply = httpx.request(method, url, json={"inputs": "a"}, headers={"host": host, "sec-fetch-site": "same-origin"})
    assert (reply.status_code, reply.json()["code"]) == (421, "unknown_host")
    assert host in reply.json()["error"]
    assert gateway.drafts == []


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST", "box.localhost", "127.0.0.1", "[::1]:8000", "10.0.0.7:8000"]
)
def test_a_service_on_loopback_answers_to_addresses_and_localhost(url: str, host: str) -> None:
    assert httpx.get(url, headers={"host": host}).status_code == 200


def test_a_service_on_loopback_answers_to_names_that_are_configured() -> None:
    settings = IngressSettings(hosts=("Images.example",), cors_origins=("https://app.example",))
    # The test client is told that it came to loopback, as behind a proxy on the same machine.
    client = TestClient(create_app(FakeGateway(), settings), base_url="http://127.0.0.1")
    for host, status in (("images.example", 200), ("app.example:443", 200), ("else.example", 421)):
        assert client.get("/", headers={"host": host}).status_code == status


def test_a_service_on_a_network_answers_to_any_name(client: TestClient) -> None:
    assert client.get("/", headers={"host": "images.example"}).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/v1/models"), ("POST", "/"), ("GET", "/nothing")])
def test_no_reply_is_taken_for_something_else_than_it_says(client: TestClient, method: str, path: str) -> None:
    reply = client.request(method, path, json={"inputs": "a cat"})
    assert reply.headers["x-content-type-options"] == "nosniff"

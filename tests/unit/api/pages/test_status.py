from __future__ import annotations

import re
import urllib.request

import pytest
from starlette.testclient import TestClient

from serve_app.api.app import create_app
from serve_app.catalog.replica_report import BaseState
from serve_app.config import IngressSettings
from tests.unit.api.fakes import FakeGateway


@pytest.mark.parametrize("path", ["/", "/health"])
def test_status_is_the_same_bytes_always(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.content == b'{"ok":"ok"}'
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", ["/", "/health"])
def test_head_has_the_headers_of_get_and_no_body(url: str, path: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(url + path, method="HEAD")) as response:
        assert (response.status, response.headers["content-length"], response.read()) == (200, "11", b"")
        assert response.headers["content-type"] == "application/json"


def test_health_is_503_while_no_base_can_serve(client: TestClient, gateway: FakeGateway) -> None:
    gateway.is_up = False
    response = client.get("/health")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert response.json() == {
        "error": "the service is starting; try again in 5 s",
        "code": "not_ready",
    }
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("is_up", [True, False])
def test_verbose_health_says_what_each_base_does(client: TestClient, gateway: FakeGateway, is_up: bool) -> None:
    gateway.is_up = is_up
    gateway.registry.does = BaseState("waiting", 1000.5, None, "no node has room")
    response = client.get("/health?verbose")
    assert response.status_code == (200 if is_up else 503)
    assert response.headers.get("retry-after") == (None if is_up else "5")
    up = {"ok": "ok"} if is_up else {"error": "the service is starting; try again in 5 s", "code": "not_ready"}
    base = {"id": "demo/sdxl", "state": "waiting", "since": 1000.5, "expected_s": None, "reason": "no node has room"}
    assert response.json() == {**up, "notices": [], "bases": [base]}


def test_a_browser_gets_a_page_that_loads_nothing_from_elsewhere(client: TestClient) -> None:
    response = client.get("/", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert response.headers["content-type"].startswith("text/html")
    assert "<title>Loraplex</title>" in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"(src|href)=.https?:", response.text)
    assert response.headers["vary"] == "accept"


def test_cross_origin_reading_is_off_unless_configured(gateway: FakeGateway) -> None:
    origin = {"origin": "https://page.example"}
    closed = TestClient(create_app(gateway, IngressSettings()))
    assert "access-control-allow-origin" not in closed.get("/", headers=origin).headers
    opened = TestClient(create_app(gateway, IngressSettings(cors_origins=("https://page.example",))))
    answer = opened.post("/", headers=origin, json={"inputs": "elephant"})
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert "x-seed" in answer.headers["access-control-expose-headers"]
    gateway.failure = ZeroDivisionError()
    failed = opened.post("/", headers=origin, json={"inputs": "elephant"})
    assert (failed.status_code, failed.headers["access-control-allow-origin"]) == (500, origin["origin"])
    asked = opened.options("/", headers={**origin, "access-control-request-method": "POST"})
    assert asked.status_code == 200


@pytest.mark.parametrize("path", ["/nope", "/model/demo/sdxl", "/v2", "/-/", "/models"])
def test_a_path_without_a_route_is_404_in_json(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.json() == {"error": f"nothing is served at {path}", "code": "not_found"}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/", "GET, HEAD, POST"),
        ("GET", "/models/demo/sdxl", "POST"),
        ("POST", "/health", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_405_with_the_right_ones(client: TestClient, method: str, path: str, allowed: str) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    assert response.json() == {"error": f"{path} takes {allowed}, not {method}", "code": "method_not_allowed"}

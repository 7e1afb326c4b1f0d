"""The access matrix: who gets in where, for every route that the application has."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from serve_app.api.app import create_app
from serve_app.api.http.auth import Access, AdminRoute, DrawingRoute, OpenRoute, need_of
from serve_app.config import ApiKey, IngressSettings, KeyLimits, digest_of
from serve_app.core import HubToken
from tests.access_matrix import ADMIN as ADMINS
from tests.access_matrix import KEYED, MATRIX, OPEN, request_of, routes, spellings
from tests.unit.api.fakes import FakeGateway

USER, ADMIN, WRONG = "lpx_user-key", "lpx_admin-key", "lpx_wrong-key"
KEYS = (
    ApiKey(name="alice", sha256=digest_of(USER)),
    ApiKey(name="root", sha256=digest_of(ADMIN), admin=True),
)
ADAPTER = {"lora_name": "mine", "source": {"uri": "acme/sketch"}}


@dataclass
class Guarded:
    """A client of an application with keys, which may be changed under way."""

    client: TestClient
    gateway: FakeGateway
    keys: list[tuple[ApiKey, ...]]
    now: list[float]
    refusals: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, key: str | None = None, **more: Any) -> Any:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        headers |= more.pop("headers", {})
        return self.client.request(method, path, headers=headers, **more)

    def limited(self, **limits: float) -> None:
        self.keys[0] = (ApiKey(name="alice", sha256=digest_of(USER), limits=KeyLimits.model_validate(limits)),)


def application(gateway: FakeGateway, keys: Callable[[], tuple[ApiKey, ...]], **more: Any) -> FastAPI:
    access = Access(keys=keys, takes_hub_tokens=True, on_refusal=more.pop("on_refusal", lambda _: None))
    return create_app(gateway, IngressSettings(), access=access, **more)


@pytest.fixture(scope="module")
def module_guarded() -> Iterator[Guarded]:
    gateway, now, refusals = FakeGateway(), [1000.0], []
    keys = [KEYS]
    app = application(gateway, lambda: keys[0], clock=lambda: now[0], on_refusal=refusals.append)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Guarded(client, gateway, keys, now, refusals)


@pytest.fixture
def guarded(module_guarded: Guarded) -> Guarded:
    module_guarded.gateway.reset()
    module_guarded.keys[0] = KEYS
    module_guarded.refusals.clear()
    module_guarded.now[0] += 1e6
    return module_guarded


def request_to(guarded: Guarded, method: str, path: str, key: str | None) -> Any:
    url, more = request_of(method, path, adapter="demo/sketch", model="demo/sdxl", image=b"no picture")
    return guarded.ask(method, url, key, **more)


def test_the_matrix_has_every_route_of_the_application_and_no_other(guarded: Guarded) -> None:
    assert set(routes(guarded.client.app)) == set(MATRIX)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [None, WRONG, USER, ADMIN])
@pytest.mark.parametrize(("method", "path"), MATRIX)
def test_every_route_lets_in_whom_it_should(guarded: Guarded, method: str, path: str, key: str | None) -> None:
    needs = MATRIX[method, path].needs
    reply = request_to(guarded, method, path, key)
    if needs == OPEN or key == ADMIN or (needs == KEYED and key == USER):
        assert reply.status_code not in (401, 403)
        return
    expected = 403 if key == USER else 401
    assert reply.status_code == expected
    assert (reply.headers.get("www-authenticate") == "Bearer") is (expected == 401)
    assert guarded.gateway.drafts == []
    assert guarded.gateway.registry.tokens == []
    assert guarded.refusals == ["admin_required" if key == USER else "unauthorised"]
    if method == "HEAD":
        return
    body = reply.json()
    if path.startswith("/v1/"):
        kind = "permission_error" if expected == 403 else "authentication_error"
        assert body["error"]["type"] == kind
        assert set(body["error"]) == {"message", "type", "param", "code"}
    else:
        assert set(body) == {"error", "code"}
        assert isinstance(body["error"], str)


def test_unknown_paths_and_methods_need_a_key_too(guarded: Guarded) -> None:
    for method, path in (("GET", "/nothing"), ("PATCH", "/v1/loras"), ("POST", "/static/app.js"), ("OPTIONS", "/")):
        assert guarded.ask(method, path).status_code == 401
        assert guarded.ask(method, path, ADMIN).status_code in (404, 405)


def test_what_bases_do_is_told_in_verbose_health_to_those_with_a_key(guarded: Guarded) -> None:
    for key in (USER, WRONG, None):
        reply = guarded.ask("GET", "/health?verbose", key)
        assert reply.status_code == 200
        assert ("bases" in reply.json()) == (key == USER)


def asked_as(guarded: Guarded, method: str, path: str, spelling: str, key: str | None) -> Any:
    url, more = request_of(method, path, adapter="demo/sketch", model="demo/sdxl", image=b"no picture")
    guarded.gateway.reset()
    # An address, as a client would put a leading `//` elsewhere.
    return guarded.ask(method, f"http://testserver{spelling}", key, **more)


@pytest.mark.parametrize(("method", "path"), [route for route, rule in MATRIX.items() if rule.needs == ADMINS])
def test_no_spelling_of_a_path_gets_a_user_past_the_admins(guarded: Guarded, method: str, path: str) -> None:
    url, _ = request_of(method, path, adapter="demo/sketch", model="demo/sdxl", image=b"")
    for spelling in spellings(url):
        for key in (USER, None):
            status = asked_as(guarded, method, path, spelling, key).status_code
            assert status >= 400, spelling
            assert (guarded.gateway.registry.tokens, guarded.gateway.registry.usage_asked) == ([], []), spelling


@pytest.mark.parametrize(("method", "path"), [route for route, rule in MATRIX.items() if rule.needs == KEYED])
def test_no_spelling_of_a_path_gets_anybody_in_without_a_key(guarded: Guarded, method: str, path: str) -> None:
    url, _ = request_of(method, path, adapter="demo/sketch", model="demo/sdxl", image=b"")
    for spelling in spellings(url):
        status = asked_as(guarded, method, path, spelling, None).status_code
        assert status >= 400, spelling
        assert (guarded.gateway.drafts, guarded.gateway.registry.tokens) == ([], []), spelling


@pytest.mark.parametrize("path", ["/v1/loras%0A", "/models/a%00b", "/models/a%1Bb", "/health%7F", "/v1/models/a%C2%85"])
def test_a_path_with_a_control_character_is_malformed(guarded: Guarded, path: str) -> None:
    reply = guarded.ask("POST", path, ADMIN, json=ADAPTER)
    assert reply.status_code == 400
    assert "control character" in reply.text


@pytest.mark.parametrize(
    "needs",
    [
        (OpenRoute, "nothing", "admin"),
        (DrawingRoute, "key", "key"),
        (APIRoute, "key", "admin"),
        (AdminRoute, "admin", "admin"),
    ],
)
def test_a_route_that_neither_reads_nor_draws_asks_for_an_admin_key(needs: tuple[type[APIRoute], str, str]) -> None:
    route = needs[0]("/new", lambda: None, methods=["GET", "POST"])
    assert (need_of(route, "GET"), need_of(route, "POST")) == needs[1:]


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", f"Basic {USER}", USER, f"Bearer {USER}x", f"Bearer {USER.upper()}", "Bearer \u00e9",
     f"Bearer {digest_of(USER)}"],
)  # fmt: skip
def test_what_is_no_key_is_refused_without_being_repeated(guarded: Guarded, value: str) -> None:
    reply = guarded.ask("GET", "/v1/models", headers={"authorization": value.encode("latin-1")})
    assert reply.status_code == 401
    assert USER not in reply.text.lower()


class Watched(tuple[ApiKey, ...]):
    """Keys that note whether somebody looked at all of them."""

    looked_at = 0

    def __iter__(self) -> Iterator[ApiKey]:
        for key in super().__iter__():
            self.looked_at += 1
            yield key


class Digest(str):
    """A digest that may be compared by nobody who ends at the first letter that differs."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared letter by letter")

    def startswith(self, *_: Any) -> bool:
        raise AssertionError("compared letter by letter")


@pytest.mark.parametrize("presented", [USER, ADMIN, WRONG])
def test_a_presented_key_is_compared_with_all_and_with_each_in_constant_time(guarded: Guarded, presented: str) -> None:
    keys = Watched(
        ApiKey.model_construct(name=key.name, sha256=Digest(key.sha256), admin=key.admin, limits=KeyLimits())
        for key in KEYS
    )
    guarded.keys[0] = keys
    status = guarded.ask("GET", "/v1/models", presented).status_code
    assert (status, keys.looked_at) == (401 if presented == WRONG else 200, len(KEYS))


def test_the_scheme_is_read_whatever_its_letter_case(guarded: Guarded) -> None:
    assert guarded.ask("GET", "/v1/models", headers={"authorization": f"bearer  {USER}"}).status_code == 200


def test_without_keys_everybody_may_do_everything() -> None:
    gateway = FakeGateway()
    with TestClient(application(gateway, tuple)) as client:
        guarded = Guarded(client, gateway, [()], [0.0])
        for method, path in MATRIX:
            assert request_to(guarded, method, path, None).status_code not in (401, 403)
        assert request_to(guarded, "POST", "/v1/loras", WRONG).status_code == 200


def test_keys_may_come_and_go(guarded: Guarded) -> None:
    new = "lpx_new"
    assert guarded.ask("GET", "/v1/models", new).status_code == 401
    guarded.keys[0] = (ApiKey(name="bob", sha256=digest_of(new)),)
    assert guarded.ask("GET", "/v1/models", new).status_code == 200
    assert guarded.ask("GET", "/v1/models", USER).status_code == 401


def test_logs_name_the_key_s_name_and_never_the_key(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="serve_app")
    token = "hf_secrettoken"
    for key in (USER, WRONG):
        guarded.ask("POST", "/", key, json={"inputs": "a cat"}, headers={"x-hf-token": token})
        guarded.ask("POST", "/v1/loras", key, json=ADAPTER, headers={"x-hf-token": token})
    guarded.gateway.failure = ValueError("unforeseen")
    guarded.ask("POST", "/", USER, json={"inputs": "a cat"}, headers={"x-hf-token": token})
    assert "with key alice" in caplog.text
    assert "the key 'alice' may not change the registry" in caplog.text
    for secret in (USER, WRONG, token, digest_of(USER)):
        assert secret not in caplog.text


# Limits


def test_a_key_over_its_rate_is_told_when_to_come_back_and_others_are_not_held_up(guarded: Guarded) -> None:
    limited = ApiKey(name="alice", sha256=digest_of(USER), limits=KeyLimits(requests_per_s=0.1, burst=1))
    guarded.keys[0] = (limited, KEYS[1])
    body = {"inputs": "a cat"}
    assert guarded.ask("POST", "/", USER, json=body).status_code == 200
    for path in ("/", "/v1/images/generations"):
        reply = guarded.ask("POST", path, USER, json=body)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "10")
    assert reply.json()["error"]["code"] == "key_limit_reached"
    assert reply.json()["error"]["type"] == "rate_limit_error"
    assert guarded.ask("POST", "/", ADMIN, json=body).status_code == 200
    assert guarded.ask("GET", "/v1/models", USER).status_code == 200, "reading is not counted"
    guarded.now[0] += 10
    assert guarded.ask("POST", "/", USER, json=body).status_code == 200


def test_images_are_counted_by_what_was_drawn(guarded: Guarded) -> None:
    guarded.limited(images_per_minute=4)
    generate = "/v1/images/generations"
    assert guarded.ask("POST", generate, USER, json={"prompt": "a", "n": 3}).status_code == 200
    reply = guarded.ask("POST", generate, USER, json={"prompt": "a", "n": 2})
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "15")
    guarded.gateway.failure = ValueError("unforeseen")
    assert guarded.ask("POST", generate, USER, json={"prompt": "a", "n": 1}).status_code == 500
    guarded.gateway.failure = None
    assert guarded.ask("POST", generate, USER, json={"prompt": "a", "n": 1}).status_code == 200, (
        "the failed one was free"
    )
    reply = guarded.ask("POST", generate, USER, json={"prompt": "a", "n": 5})
    assert reply.status_code == 400
    assert (reply.json()["error"]["param"], "at most 4" in reply.text) == ("n", True)


def test_a_second_request_at_once_is_refused_and_may_come_after_the_first(guarded: Guarded) -> None:
    guarded.limited(concurrency=1)
    guarded.gateway.is_stuck = True
    replies: list[Any] = []
    with TestClient(guarded.client.app) as other:
        first = threading.Thread(
            target=lambda: replies.append(
                other.post("/", json={"inputs": "a cat"}, headers={"authorization": f"Bearer {USER}"})
            )
        )
        first.start()
        try:
            assert guarded.gateway.started.wait(60)
            reply = guarded.ask("POST", "/", USER, json={"inputs": "a cat"}, headers={"x-request-timeout-s": "60"})
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
            assert replies == []
        finally:
            guarded.gateway.release()
        first.join(120)
    assert replies[0].status_code == 200
    assert guarded.ask("POST", "/", USER, json={"inputs": "a cat"}).status_code == 200


# Tokens for the Hub


def test_with_keys_a_hub_token_comes_in_a_header_of_its_own(guarded: Guarded) -> None:
    guarded.ask("POST", "/", USER, json={"inputs": "a cat"}, headers={"x-hf-token": "hf_mine"})
    assert guarded.gateway.draft.hub_token == HubToken("hf_mine")
    guarded.ask("POST", "/v1/loras", ADMIN, json=ADAPTER, headers={"x-hf-token": "hf_other"})
    assert guarded.gateway.registry.tokens == [HubToken("hf_other")]
    assert guarded.ask("POST", "/", "hf_mine", json={"inputs": "a cat"}).status_code == 401


@pytest.mark.parametrize("value", ["mine", "hf_", "hf_a b", "hf_a\tb", "Bearer hf_mine", "hf_" + "a" * 300])
def test_what_is_no_hub_token_is_refused_without_being_repeated(guarded: Guarded, value: str) -> None:
    reply = guarded.ask("POST", "/", USER, json={"inputs": "a cat"}, headers={"x-hf-token": value})
    assert reply.status_code == 400
    assert json.loads(reply.text)["code"] == "malformed_request"
    assert "mine" not in reply.text


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({"authorization": "Bearer hf_mine"}, "hf_mine"),
        ({"authorization": "bearer hf_mine"}, "hf_mine"),
        ({"x-hf-token": "hf_mine", "authorization": "Bearer hf_other"}, "hf_mine"),
        ({"authorization": "Bearer none"}, None),
        ({"authorization": "Basic hf_mine"}, None),
        ({}, None),
    ],
)
def test_without_keys_a_hub_token_may_be_the_bearer(headers: dict[str, str], token: str | None) -> None:
    gateway = FakeGateway()
    with TestClient(application(gateway, tuple)) as client:
        assert client.post("/", json={"inputs": "a cat"}, headers=headers).status_code == 200
    assert gateway.draft.hub_token == (None if token is None else HubToken(token))


def test_a_service_that_forwards_no_tokens_does_not_look_at_them(guarded: Guarded) -> None:
    gateway = FakeGateway()
    with TestClient(create_app(gateway, IngressSettings(), access=Access())) as client:
        assert client.post("/", json={"inputs": "a"}, headers={"x-hf-token": "not one"}).status_code == 200
        assert client.post("/", json={"inputs": "a"}, headers={"authorization": "Bearer hf_mine"}).status_code == 200
    assert [draft.hub_token for draft in gateway.drafts] == [None, None]


def test_a_draft_shows_no_token(guarded: Guarded) -> None:
    guarded.ask("POST", "/", USER, json={"inputs": "a cat"}, headers={"x-hf-token": "hf_mine"})
    assert not re.search("hf_mine", repr(guarded.gateway.draft))

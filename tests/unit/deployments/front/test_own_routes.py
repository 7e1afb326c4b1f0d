"""Two applications behind one proxy: the layers act on ours alone, wherever it lies."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from ray.serve._private.common import DeploymentID, EndpointInfo
from ray.serve._private.http_util import RequestIdMiddleware
from ray.serve._private.proxy_router import ProxyRouter
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from serve_app.deployments.front.load_shedding import LoadSheddingMiddleware
from serve_app.deployments.front.own_routes import FRONT_HEADER, INGRESS_NAME, OwnRoutesOnly
from serve_app.deployments.front.retry import RetryMiddleware
from serve_app.deployments.proxy import ServeHeaderFilter


class Handle:
    """What Serve's table of routes holds of a deployment."""

    def __init__(self, name: str) -> None:
        self.deployment_name = name


class Proxy:
    """Serve's proxy with its own table of routes; every application answers with one status."""

    def __init__(self, status: int, **applications: tuple[str, str]) -> None:
        self.proxy_router = ProxyRouter(lambda id_, _: Handle(id_.name))  # type: ignore[arg-type]
        self.proxy_router.update_routes(
            {
                DeploymentID(name=name, app_name=app): EndpointInfo(route=route, app_is_cross_language=False)
                for app, (route, name) in applications.items()
            }
        )
        self.status = status
        self.seen: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope)
        await JSONResponse({"error": "declined"}, self.status)(scope, receive, send)


def behind_layers(proxy: Proxy) -> tuple[httpx.AsyncClient, list[LoadSheddingMiddleware]]:
    shedding: list[LoadSheddingMiddleware] = []

    def layers(app: Any) -> Any:
        shedding.append(LoadSheddingMiddleware(RetryMiddleware(app, lambda _: None, backoff_s=0.0), lambda: None))
        return ServeHeaderFilter(shedding[0])

    app: Any = OwnRoutesOnly(RequestIdMiddleware(proxy), layers)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://t"), shedding


def two_applications(status: int, ours: str, others: str) -> Proxy:
    return Proxy(status, loraplex=(ours, INGRESS_NAME), billing=(others, "Ingress"))


@pytest.mark.parametrize(("ours", "others"), [("/", "/billing"), ("/loraplex", "/"), ("/loraplex", "/billing")])
async def test_a_failing_post_of_another_application_runs_once_and_keeps_its_answer(ours: str, others: str) -> None:
    proxy = two_applications(502, ours, others)
    client, _ = behind_layers(proxy)
    answer = await client.post(f"{others.rstrip('/')}/charge", content=b"10 EUR", headers={"x-session-id": "s1"})
    assert (answer.status_code, answer.json(), len(proxy.seen)) == (502, {"error": "declined"}, 1)
    headers = dict(proxy.seen[0]["headers"])
    assert headers[b"x-session-id"] == b"s1"
    assert FRONT_HEADER.encode() not in headers


@pytest.mark.parametrize("ours", ["/", "/loraplex"])
async def test_a_lost_request_of_ours_is_sent_again(ours: str) -> None:
    proxy = two_applications(500, ours, "/billing")
    client, _ = behind_layers(proxy)
    answer = await client.post(f"{ours.rstrip('/')}/v1/images/generations", headers={"x-session-id": "s1"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "ingress_lost"
    assert len(proxy.seen) == 4
    headers = dict(proxy.seen[0]["headers"])
    assert headers[FRONT_HEADER.encode()] == b"1"
    assert b"x-session-id" not in headers


async def test_while_ours_is_full_another_application_is_let_in() -> None:
    proxy = two_applications(200, "/loraplex", "/")
    client, [shedding] = behind_layers(proxy)
    shedding.limit.set_capacity(0)
    shedding.limit.in_flight = shedding.limit.max_in_flight
    assert (await client.post("/loraplex/models/a")).status_code == 429
    assert (await client.post("/loraplex/v1/loras")).status_code == 200
    assert (await client.post("/other")).status_code == 200


async def test_before_serve_has_our_route_a_request_is_sent_again_and_later_a_404_is_an_answer() -> None:
    early = Proxy(404)
    client, _ = behind_layers(early)
    assert (await client.get("/v1/models")).status_code == 503
    assert len(early.seen) == 4
    late = Proxy(404, loraplex=("/loraplex", INGRESS_NAME))
    client, _ = behind_layers(late)
    assert (await client.get("/nowhere")).status_code == 404
    assert len(late.seen) == 1

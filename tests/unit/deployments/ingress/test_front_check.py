from __future__ import annotations

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve_app.deployments.front.own_routes import FRONT_HEADER
from serve_app.deployments.ingress.middleware import NO_FRONT, FrontCheckMiddleware


def client() -> httpx.AsyncClient:
    async def told(request: Request) -> Response:
        return JSONResponse(request.state.notices)

    app = FrontCheckMiddleware(Starlette(routes=[Route("/", told)]))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://t")


async def test_requests_without_the_layers_are_noticed_once_in_the_log_and_told_to_routes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with client() as http:
        assert [(await http.get("/")).json() for _ in range(3)] == [[NO_FRONT]] * 3
    assert [record.message for record in caplog.records if record.name.startswith("serve_app")] == [NO_FRONT]


async def test_with_the_layers_there_is_nothing_to_notice(caplog: pytest.LogCaptureFixture) -> None:
    async with client() as http:
        assert (await http.get("/", headers={FRONT_HEADER: "1"})).json() == []
    assert not [record for record in caplog.records if record.name.startswith("serve_app")]

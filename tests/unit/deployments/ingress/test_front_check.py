from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from serve_app.deployments.front.own_routes import FRONT_HEADER
from serve_app.deployments.ingress.middleware import NO_FRONT, FrontCheckMiddleware


def client_of(status: int = 200) -> httpx.AsyncClient:
    async def health(_: Any) -> Response:
        return Response(b'{"ok":"ok"}' if status == 200 else b"not yet", status)

    app = FrontCheckMiddleware(Starlette(routes=[Route("/health", health)]))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://t")


async def test_requests_without_the_layers_are_noticed_once_in_the_log_and_in_verbose_health(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with client_of() as client:
        for _ in range(3):
            assert (await client.get("/health")).content == b'{"ok":"ok"}'
        assert (await client.get("/health?verbose")).json() == {"ok": "ok", "notices": [NO_FRONT]}
    assert [record.message for record in caplog.records if record.name.startswith("serve_app")] == [NO_FRONT]


async def test_with_the_layers_there_is_nothing_to_notice(caplog: pytest.LogCaptureFixture) -> None:
    async with client_of() as client:
        answer = await client.get("/health?verbose=1", headers={FRONT_HEADER: "1"})
    assert answer.json() == {"ok": "ok", "notices": []}
    assert not [record for record in caplog.records if record.name.startswith("serve_app")]


async def test_verbose_health_leaves_a_refusal_as_it_is() -> None:
    async with client_of(503) as client:
        answer = await client.get("/health?verbose")
    assert (answer.status_code, answer.text) == (503, "not yet")

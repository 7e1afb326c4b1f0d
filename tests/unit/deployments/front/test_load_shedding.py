from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from serve_app.deployments.front.load_shedding import (
    DEFAULT_CAPACITY,
    HELD_HEADER,
    REPORT_TTL_S,
    SLACK_REQUESTS,
    CapacityHeaderMiddleware,
    InFlightLimit,
    LoadSheddingMiddleware,
)
from tests.clock import Clock


class Service:
    """Behind the door: answers once it is let, with a status and headers."""

    def __init__(self, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, headers or {}
        self.may_answer = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.may_answer.wait()
        headers = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})


async def asked(app: Any, path: str = "/", method: str = "POST") -> tuple[int, dict[str, str], bytes]:
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        messages.append(message)

    await app({"type": "http", "method": method, "path": path, "headers": []}, receive, send)
    head = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
    return messages[0]["status"], head, messages[1]["body"]


async def test_what_is_inside_never_exceeds_what_the_ingress_replicas_hold_and_a_little_more() -> None:
    shed: list[None] = []
    service = Service()
    layer = LoadSheddingMiddleware(service, lambda: shed.append(None), clock=Clock())
    layer.limit.record_rejection("a", 40, retry_after_s=7)
    layer.limit.record_rejection("b", 20, retry_after_s=9)
    most = 60 + 3 + SLACK_REQUESTS
    waiting = [asyncio.create_task(asked(layer)) for _ in range(most)]
    await asyncio.sleep(0)
    assert layer.limit.in_flight == most
    status, headers, body = await asked(layer)
    assert (status, headers["retry-after"], json.loads(body)["code"]) == (429, "9", "overloaded")
    assert "x-request-id" in headers
    _, _, body = await asked(layer, "/v1/images/generations")
    assert json.loads(body)["error"]["code"] == "overloaded"
    assert len(shed) == 2
    service.may_answer.set()
    assert {status for status, _, _ in await asyncio.gather(*waiting)} == {200}
    assert (await asked(layer))[0] == 200
    assert layer.limit.in_flight == 0


async def test_health_and_the_registry_pass_a_closed_door() -> None:
    service = Service()
    service.may_answer.set()
    layer = LoadSheddingMiddleware(service, lambda: None, clock=Clock())
    layer.limit.record_rejection("a", 0, retry_after_s=1)
    layer.limit.in_flight = 10_000
    assert (await asked(layer, "/health", "GET"))[0] == 200
    assert (await asked(layer, "/v1/loras"))[0] == 200
    assert (await asked(layer))[0] == 429


async def test_the_proxy_hears_what_is_held_and_the_caller_does_not() -> None:
    service = Service(429, {"retry-after": "12"})
    service.may_answer.set()
    layer = LoadSheddingMiddleware(
        CapacityHeaderMiddleware(service, replica="a", most=lambda: 80, held=lambda: 33), lambda: None, clock=Clock()
    )
    status, headers, _ = await asked(layer)
    assert (status, headers) == (429, {"retry-after": "12"})
    assert (layer.limit.max_in_flight, layer.limit.retry_after_s) == (33 + 2 + SLACK_REQUESTS, 12)


async def test_a_key_s_own_limit_tells_nothing_of_room() -> None:
    service = Service(429, {"retry-after": "12"})
    service.may_answer.set()
    layer = LoadSheddingMiddleware(
        CapacityHeaderMiddleware(service, replica="a", most=lambda: 80, held=lambda: None), lambda: None, clock=Clock()
    )
    _, headers, _ = await asked(layer)
    assert HELD_HEADER not in headers
    assert layer.limit.max_in_flight == 80 + 5 + SLACK_REQUESTS


def test_old_news_and_lost_replicas_close_no_door() -> None:
    clock = Clock()
    limit = InFlightLimit(clock)
    assert limit.max_in_flight == DEFAULT_CAPACITY + DEFAULT_CAPACITY // 16 + SLACK_REQUESTS
    limit.set_capacity(160)
    assert limit.max_in_flight == 160 + 10 + SLACK_REQUESTS
    limit.record_rejection("a", 8, retry_after_s=1)
    clock.now = REPORT_TTL_S / 2
    limit.record_rejection("b", 4, retry_after_s=1)
    assert limit.max_in_flight == 12 + SLACK_REQUESTS
    clock.now = REPORT_TTL_S * 1.2
    assert limit.max_in_flight == 4 + SLACK_REQUESTS
    clock.now = REPORT_TTL_S * 2
    assert limit.max_in_flight == 160 + 10 + SLACK_REQUESTS


async def test_a_caller_who_leaves_makes_room() -> None:
    layer = LoadSheddingMiddleware(Service(), lambda: None, clock=Clock())
    caller = asyncio.create_task(asked(layer))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    assert layer.limit.in_flight == 0


async def test_callers_who_are_slow_to_send_keep_nobody_out() -> None:
    arrived = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        await asyncio.Event().wait()

    async def receive() -> Message:
        await arrived.wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None: ...

    layer = LoadSheddingMiddleware(app, lambda: None, clock=Clock())
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    callers = [asyncio.create_task(layer(scope, receive, send)) for _ in range(3)]
    await asyncio.sleep(0)
    assert layer.limit.in_flight == 0
    arrived.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert layer.limit.in_flight == 3
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert layer.limit.in_flight == 0

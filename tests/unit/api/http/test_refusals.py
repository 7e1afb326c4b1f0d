from __future__ import annotations

import asyncio
import logging

import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from serve_app import errors, refusals
from serve_app.api.app import create_app
from serve_app.config import IngressSettings
from tests.unit.api.fakes import FakeGateway
from tests.unit.api.pictures.test_images import png_of_size

REFUSALS: list[tuple[errors.LoraplexError, int, str | None]] = [
    (errors.OutOfBounds("width", 60, "a multiple of 8"), 400, None),
    (errors.UnknownScheduler("X", "demo/sdxl", "DDIMScheduler"), 400, None),
    (errors.BaseMismatch("a/b", "demo/sd15", "demo/sdxl"), 400, None),
    (errors.Unauthorized("no valid key"), 401, None),
    (errors.AccessDenied("a/b"), 403, None),
    (errors.ModelNotFound("a/b"), 404, None),
    (refusals.UnsafeFile("a/b", "it is a pickle file"), 422, None),
    (refusals.BaseNotServed("a/b", "it is for another base"), 422, None),
    (errors.QueueFull("demo/sdxl", 64, 3), 429, "3"),
    (errors.InternalError("made-id"), 500, None),
    (errors.NotReady("demo/sdxl"), 503, "5"),
    (errors.HubUnavailable("a/b", "the Hub did not answer"), 503, "10"),
    (errors.ReplicaLost("demo/sdxl", 3), 503, "2"),
    (errors.DeadlineExceeded(300), 504, None),
]


@pytest.mark.parametrize(("error", "status", "retry_after"), REFUSALS, ids=lambda value: type(value).__name__)
def test_every_error_is_one_sentence_a_code_and_its_status(
    client: TestClient,
    gateway: FakeGateway,
    error: errors.LoraplexError,
    status: int,
    retry_after: str | None,
) -> None:
    gateway.failure = error
    response = client.post("/", json={"inputs": "elephant"})
    assert response.status_code == status
    assert response.json() == {"error": str(error), "code": error.code}
    assert response.headers.get("retry-after") == retry_after
    assert response.headers["x-request-id"] == "made-id"


def test_an_unexpected_failure_tells_the_caller_nothing_and_the_log_everything(
    client: TestClient, gateway: FakeGateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.failure = ZeroDivisionError("/secret/path on host-17")
    with caplog.at_level(logging.ERROR):
        response = client.post("/", json={"inputs": "elephant"})
    assert response.status_code == 500
    assert response.json() == {
        "error": "the service failed on this request; its id is made-id",
        "code": "internal",
    }
    assert response.headers["x-request-id"] == "made-id"
    assert "made-id" in caplog.text
    assert "ZeroDivisionError: /secret/path on host-17" in caplog.text


def test_a_request_that_takes_too_long_is_cancelled_and_answered(gateway: FakeGateway) -> None:
    gateway.is_stuck = True
    client = TestClient(create_app(gateway, IngressSettings(), request_timeout_s=0.05))
    response = client.post("/", json={"inputs": "elephant"})
    assert response.status_code == 504
    assert response.json()["error"] == "the request took longer than 0.05 s and was stopped"
    assert gateway.cancelled.is_set()


def small(gateway: FakeGateway) -> TestClient:
    return TestClient(create_app(gateway, IngressSettings(max_body=1000, max_image_pixels=10_000)))


def test_a_body_over_the_limit_is_refused_by_its_declared_length(gateway: FakeGateway) -> None:
    response = small(gateway).post("/", content=b"x" * 1001)
    assert (response.status_code, response.json()["code"]) == (413, "too_large")
    assert response.json()["error"] == "the body is too large; the limit is 1000B"


class EndlessCaller:
    """An ASGI caller who never ends the body: only a server that stops reading can answer."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.status: int | None = None

    async def receive(self) -> Message:
        self.sent_bytes += 400
        return {"type": "http.request", "body": b"x" * 400, "more_body": True}

    async def send(self, message: Message) -> None:
        self.status = message.get("status", self.status)


async def test_a_body_without_a_length_is_refused_while_it_is_read(gateway: FakeGateway) -> None:
    caller = EndlessCaller()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "headers": [],
        "query_string": b"",
        "root_path": "",
    }
    await create_app(gateway, IngressSettings(max_body=1000))(scope, caller.receive, caller.send)
    assert (caller.status, caller.sent_bytes) == (413, 1200)


def test_a_picture_with_too_many_pixels_is_refused_by_its_header(gateway: FakeGateway) -> None:
    response = small(gateway).post("/", content=png_of_size(60_000, 60_000))
    assert (response.status_code, response.json()["code"]) == (413, "too_large")
    assert gateway.drafts == []


async def test_a_server_that_cancels_a_request_cancels_its_generation(gateway: FakeGateway) -> None:
    gateway.is_stuck = True
    started = asyncio.Event()
    gateway.on_generate = started.set
    body = iter([{"type": "http.request", "body": b'{"inputs": "elephant"}', "more_body": False}])

    async def receive() -> Message:
        for message in body:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b"", "root_path": ""}
    request = asyncio.ensure_future(create_app(gateway, IngressSettings())(scope, receive, send))
    await started.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert gateway.cancelled.is_set()


def test_a_head_that_is_too_large_is_refused_in_the_shape_of_its_route(
    client: TestClient, gateway: FakeGateway
) -> None:
    long = {"x-a": "a" * 40_000}
    reply = client.post("/", json={"inputs": "elephant"}, headers=long)
    assert (reply.status_code, reply.json()["code"]) == (431, "headers_too_large")
    assert "at most 32768 are read" in reply.json()["error"]
    reply = client.get("/v1/models?after=" + "a" * 40_000)
    assert (reply.status_code, reply.json()["error"]["code"]) == (431, "headers_too_large")
    assert gateway.drafts == []
    assert client.post("/", json={"inputs": "elephant"}, headers={"x-a": "a" * 20_000}).status_code == 200

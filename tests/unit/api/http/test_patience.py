"""Slow on either side: silent streams are kept alive, slow senders are cut off, and clients come back when told to."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from serve_app.api.app import create_app
from serve_app.api.http.events import KEEP_ALIVE, EventStream, ServerEvent
from serve_app.config import IngressSettings
from serve_app.errors import HubUnavailable, NotReady, QueueFull
from tests.unit.api.fakes import FakeGateway, served
from tests.unit.api.http.test_clients import connect

TICK_S = 0.05


@pytest.fixture(scope="module")
def nervous_gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture(scope="module")
def nervous_url(nervous_gateway: FakeGateway) -> Iterator[str]:
    """A server that keeps streams alive every moment."""
    with served(create_app(nervous_gateway, IngressSettings(sse_ping_interval_s=TICK_S))) as url:
        yield url


@pytest.fixture(scope="module")
def hasty_url(nervous_gateway: FakeGateway) -> Iterator[str]:
    """A server that gives bodies no more than a moment."""
    with served(create_app(nervous_gateway, IngressSettings(body_timeout_s=TICK_S))) as url:
        yield url


def test_a_silent_stream_is_kept_alive_by_comments(nervous_url: str, nervous_gateway: FakeGateway) -> None:
    nervous_gateway.reset()
    nervous_gateway.is_stuck = nervous_gateway.is_begun = True
    body = {"prompt": "elephant", "stream": True}
    with httpx.stream("POST", f"{nervous_url}/v1/images/generations", json=body, timeout=60, trust_env=False) as reply:
        comments = (line for line in reply.iter_lines() if line.startswith(":"))
        assert [next(comments) for _ in range(3)] == [": keep-alive"] * 3
    assert nervous_gateway.cancelled.wait(60)


def test_a_client_passes_the_comments_over(nervous_url: str, nervous_gateway: FakeGateway) -> None:
    nervous_gateway.reset()
    nervous_gateway.is_stuck = nervous_gateway.is_begun = True
    header = {"x-request-timeout-s": str(5 * TICK_S)}
    with (
        openai.OpenAI(base_url=f"{nervous_url}/v1", api_key="unused", max_retries=0) as ai,
        pytest.raises(openai.APIError, match="longer than") as caught,
        ai.images.generate(prompt="elephant", stream=True, extra_headers=header) as stream,
    ):
        assert {event.type for event in stream} == {"image_generation.progress"}  # type: ignore[comparison-overlap]
    assert caught.value.code == "deadline_exceeded"


async def test_no_comment_stands_between_events_that_come_in_time() -> None:
    async def events() -> Any:
        for number in range(3):
            yield ServerEvent("tick", str(number))

    written: list[bytes] = []

    async def send(message: Any) -> None:
        written.append(message.get("body", b""))

    async def receive() -> Any:
        raise AssertionError("nobody should ask")

    stream = EventStream(events(), request_id="id", keep_alive_s=60.0)
    await stream({"type": "http"}, receive, send)
    assert KEEP_ALIVE not in written
    assert b"".join(written).count(b"event: tick") == 3


@pytest.mark.parametrize("path", ["/", "/v1/images/generations", "/v1/images/edits"])
def test_a_body_that_does_not_arrive_is_waited_for_no_longer_than_allowed(
    hasty_url: str, nervous_gateway: FakeGateway, path: str
) -> None:
    nervous_gateway.reset()
    with connect(hasty_url) as caller:
        caller.sendall(
            f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1000\r\n\r\n".encode() + b'{"inputs": "ele'
        )
        reply = caller.makefile("rb").read()  # to the end: the server closes the connection
    head, _, content = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in content
    assert "did not arrive within 0.05 s" in str(json.loads(content)["error"])
    assert nervous_gateway.drafts == []


@pytest.mark.parametrize(
    "failure",
    [QueueFull("demo/sdxl", 3, retry_after_s=1), NotReady("demo/sdxl", 1), HubUnavailable("a/b", "it is slow", 1)],
    ids=lambda failure: failure.code,
)
def test_the_client_waits_as_long_as_it_is_told_and_gets_its_image(
    url: str, gateway: FakeGateway, failure: Exception
) -> None:
    def fail_once() -> None:
        gateway.failure = failure if len(gateway.drafts) == 1 else None

    gateway.on_generate = fail_once
    started = time.monotonic()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=1) as ai:
        reply = ai.images.generate(prompt="elephant")
    assert reply.data
    assert len(gateway.drafts) == 2
    # Without the header the client would come back after half a second.
    assert time.monotonic() - started >= 1.0

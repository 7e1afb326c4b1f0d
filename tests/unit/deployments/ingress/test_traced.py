"""Which requests become spans, and for how long."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve_app.config import TracingSettings
from serve_app.deployments.ingress.middleware import TracingMiddleware
from serve_app.observability.tracing import close_tracing, record, request_span, set_up_tracing
from tests.collector import Collector


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        set_up_tracing(TracingSettings(endpoint=collector.endpoint, sample=1.0), part="test")
        yield collector
        close_tracing()


async def face(scope: Scope, receive: Receive, send: Send) -> None:
    """An answer in two parts, with something to trace between them."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"first", "more_body": True})
    record("between", request_span().context, began_ago_s=0.0, lasted_s=0.0)
    await send({"type": "http.response.body", "body": b"last"})


async def ask(method: str) -> str:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(TracingMiddleware(face)), base_url="http://test"
    ) as client:
        return (await client.request(method, "/")).text


async def test_a_request_is_one_span_from_its_first_to_its_last_byte(collector: Collector) -> None:
    assert await ask("POST") == "firstlast"
    close_tracing()
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {"request", "between"}
    assert spans["between"].parent == spans["request"].id
    assert spans["between"].ended <= spans["request"].ended


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_what_only_reads_is_not_traced(collector: Collector, method: str) -> None:
    await ask(method)
    close_tracing()
    assert collector.spans == []

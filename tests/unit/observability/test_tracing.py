"""Traces as a collector gets them, over HTTP; how they cross processes is in `tests/integration/test_tracing.py`."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from pydantic import ValidationError

from serve_app.config import TracingSettings
from serve_app.core import AdapterSpec, GenerationRequest, HubToken, ScaledAdapter, TraceContext
from serve_app.errors import InternalError, QueueFull
from serve_app.observability.tracing import (
    answered,
    close_tracing,
    record,
    request_span,
    set_up_tracing,
    span,
    tracing_request,
)
from tests.collector import Collected, Collector

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, CALLERS_SPAN = CALLER.split("-")[1:3]
SPEC = AdapterSpec("acme/oil", "demo/sd15", "1" * 40, "a.safetensors", "hub", "acme/oil", 10)
REQUEST = GenerationRequest(
    "r1", "demo/sd15", "a secret prompt", None, (ScaledAdapter(SPEC, 1.0),), 64, 32, 20, 7.5, None, 3, num_images=2
)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector
        close_tracing()


def trace(collector: Collector, *, sample: float = 1.0) -> None:
    set_up_tracing(TracingSettings(endpoint=collector.endpoint, sample=sample), part="test")


def sent(collector: Collector) -> dict[str, Collected]:
    close_tracing()
    return {one.name: one for one in collector.spans}


def test_a_caller_s_trace_is_continued_and_says_how_it_was_answered(collector: Collector) -> None:
    trace(collector, sample=0.0)
    with tracing_request({"traceparent": CALLER, "tracestate": "vendor=1"}):
        request_span().describe(REQUEST)
        carried = request_span().carried_by(REQUEST).trace
        answered(route="/models/{model}", status=200, base_id="demo/sd15")
    one = sent(collector)["request"]
    assert (one.trace, one.parent, one.part, one.is_error) == (TRACE, CALLERS_SPAN, "test", False)
    assert carried == TraceContext(f"00-{TRACE}-{one.id}-01", "vendor=1")
    assert one.facts == {
        "http.route": "/models/{model}",
        "http.response.status_code": 200,
        "loraplex.request_id": "r1",
        "loraplex.base": "demo/sd15",
        "loraplex.adapters": ["acme/oil"],
        "loraplex.steps": 20,
        "loraplex.pixels": 4096,
    }


def test_parts_are_below_what_they_are_part_of_even_where_they_are_told_afterwards(collector: Collector) -> None:
    trace(collector)
    with tracing_request({}):
        parent = request_span().context
        with span("resolve", parent):
            pass
        record("denoise", parent, began_ago_s=3.0, lasted_s=2.0, steps=20)
    spans = sent(collector)
    root = spans["request"]
    assert root.parent == ""
    assert {(one.trace, one.parent) for one in (spans["resolve"], spans["denoise"])} == {(root.trace, root.id)}
    assert spans["denoise"].ended - spans["denoise"].began == 2_000_000_000
    assert 0.9e9 < root.ended - spans["denoise"].ended < 60e9


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": CALLER[:-1] + "0"},
        {},
        {"traceparent": "00-not-a-trace"},
        {"traceparent": CALLER.replace(TRACE, "0" * 32)},
    ],
    ids=["the caller says no", "no caller says yes", "malformed", "a trace of zeros"],
)
def test_what_is_not_sampled_is_not_traced_anywhere(collector: Collector, headers: dict[str, str]) -> None:
    trace(collector, sample=0.0)
    with tracing_request(headers):
        assert request_span().context is None
        assert request_span().carried_by(REQUEST) is REQUEST
    assert sent(collector) == {}


def test_a_request_with_a_private_adapter_tells_neither_its_name_nor_token_nor_prompt(collector: Collector) -> None:
    trace(collector)
    private = replace(REQUEST, hub_token=HubToken("hf_" + "secretsecretsecret"))

    def fail() -> None:
        with tracing_request({}), span("fetch", request_span().context) as fetching:
            fetching.describe(private)
            raise RuntimeError("hf_secretsecretsecret is not welcome at acme/oil")

    with pytest.raises(RuntimeError):
        fail()
    assert sent(collector)["fetch"].facts["loraplex.adapters"] == ["private"]
    for word in (b"oil", b"secret", b"welcome"):
        assert word not in b"".join(collector.bodies)


def test_errors_are_told_by_their_code_and_only_ours_are_failures(collector: Collector) -> None:
    trace(collector)
    with tracing_request({}):
        parent = request_span().context
        record("queue", parent, began_ago_s=1.0, lasted_s=1.0, error=InternalError("r1"))
        with pytest.raises(asyncio.CancelledError), span("fetch", parent):
            raise asyncio.CancelledError
        request_span().refuse(QueueFull("demo/sd15", 3))
    spans = sent(collector)
    assert (spans["queue"].is_error, spans["queue"].facts["error.type"]) == (True, "internal")
    assert (spans["fetch"].is_error, spans["fetch"].facts["loraplex.cancelled"]) == (False, True)
    assert (spans["request"].is_error, spans["request"].facts["loraplex.code"]) == (False, "queue_full")


def test_a_collector_that_refuses_is_named_once_and_costs_no_request(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[int, bool]] = []
    collector.status = 400
    set_up_tracing(
        TracingSettings(endpoint=collector.endpoint, sample=1.0),
        part="test",
        on_sent=lambda spans, is_sent: told.append((spans, is_sent)),
    )
    with caplog.at_level(logging.INFO), tracing_request({}):
        record("queue", request_span().context, began_ago_s=0.1, lasted_s=0.1)
    with caplog.at_level(logging.INFO):
        close_tracing()
    assert {is_sent for _, is_sent in told} == {False}
    assert sum(spans for spans, _ in told) == 2
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["the collector of tracing.endpoint does not accept spans; they are lost until it does"]


def test_without_an_endpoint_nothing_is_traced_and_no_sdk_is_loaded() -> None:
    program = (
        "import sys; from serve_app.config import TracingSettings; from serve_app.observability import tracing as t\n"
        "t.set_up_tracing(TracingSettings(), part='x')\n"
        f"with t.tracing_request({{'traceparent': '{CALLER}'}}):\n"
        "    with t.span('a', t.request_span().context): t.record('b', None, began_ago_s=1, lasted_s=1)\n"
        "    t.answered(route='/', status=200, base_id=None)\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not [name for name in loaded.stdout.split() if name.startswith("opentelemetry")]


def test_an_endpoint_without_the_exporter_is_refused_with_what_to_install() -> None:
    program = (
        "import sys; from serve_app.config import TracingSettings\n"
        "from serve_app.observability.tracing import check_tracing\n"
        "sys.modules['opentelemetry'] = None\n"
        "check_tracing(TracingSettings(endpoint='http://127.0.0.1:4318'))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode != 0
    assert "pip install 'loraplex[tracing]'" in ended.stderr


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://x", "http://me:word@x:4318", "http://", "http://x?a=b"])
def test_an_endpoint_that_is_no_plain_address_is_refused(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="endpoint"):
        TracingSettings(endpoint=endpoint)

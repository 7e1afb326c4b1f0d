"""One request's trace across Serve's processes, as a collector of OpenTelemetry gets it from them."""

from __future__ import annotations

import json
import uuid

import httpx

from tests.collector import Collected, Collector
from tests.service import Service

PROMPT = "a red circle on a green background"
PARTS = {"request", "resolve", "route", "replica.generate", "fetch", "queue", "swap", "denoise", "decode"}
CALLERS_SPAN = "b7ad6b7169203331"
WAIT_S = 60.0


def new_trace() -> tuple[str, dict[str, str]]:
    trace = uuid.uuid4().hex
    return trace, {"traceparent": f"00-{trace}-{CALLERS_SPAN}-01"}


def collected(collector: Collector, trace: str, names: set[str]) -> dict[str, Collected]:
    spans = collector.of_trace(trace, until=lambda spans: names <= {span.name for span in spans}, timeout_s=WAIT_S)
    assert len(spans) == len({span.name for span in spans})
    return {span.name: span for span in spans}


def check_parents(spans: dict[str, Collected]) -> None:
    request, replica = spans["request"], spans["replica.generate"]
    assert request.parent == CALLERS_SPAN
    assert {spans[name].parent for name in ("resolve", "route", "replica.generate")} == {request.id}
    below = {spans[name].parent for name in ("fetch", "queue", "swap", "denoise", "decode")}
    assert below == {replica.id}
    assert {span.part for span in spans.values()} == {"ingress", "replica of demo/sd15"}
    assert {name for name, span in spans.items() if span.part == "ingress"} == {"request", "resolve", "route"}


def test_a_caller_s_trace_goes_on_through_ingress_router_replica_and_device_thread(
    service: Service, collector: Collector
) -> None:
    trace, headers = new_trace()
    body = {"inputs": PROMPT, "parameters": {"seed": 3, "num_inference_steps": 7}}
    headers |= {"x-request-id": "traced-1", "authorization": "Bearer not-a-key-of-anybody"}
    reply = service.http.post("/models/demo/sd15-night", json=body, headers=headers)
    assert reply.status_code == 200, reply.text

    spans = collected(collector, trace, PARTS)
    assert set(spans) == PARTS
    check_parents(spans)
    request, replica, denoise = spans["request"], spans["replica.generate"], spans["denoise"]
    assert request.facts["http.route"] == "/models/{id:path}"
    assert request.facts["http.response.status_code"] == 200
    for one in (request, replica):
        assert one.facts["loraplex.base"] == "demo/sd15"
        assert one.facts["loraplex.adapters"] == ["demo/sd15-night"]
        assert one.facts["loraplex.request_id"] == "traced-1"
    assert spans["route"].facts["loraplex.replica"]
    assert (denoise.facts["loraplex.steps"], denoise.facts["loraplex.pixels"]) == (7, 64 * 64)
    order = ["request", "resolve", "route", "fetch", "queue", "swap", "denoise", "decode"]
    begun = [spans[name].began for name in order]
    assert begun == sorted(begun)
    assert max(span.ended for span in spans.values()) == request.ended
    assert not any(span.is_error for span in spans.values())
    told = json.dumps([span.facts for span in spans.values()])
    assert PROMPT not in told
    assert "not-a-key" not in told


def test_a_stream_is_one_trace_as_well(service: Service, collector: Collector) -> None:
    trace, headers = new_trace()
    body = {"model": "demo/sd15", "prompt": PROMPT, "stream": True, "n": 1}
    with service.http.stream("POST", "/v1/images/generations", json=body, headers=headers) as reply:
        assert reply.status_code == 200
        assert "event: image_generation.completed" in list(reply.iter_lines())
    check_parents(collected(collector, trace, PARTS))


def test_a_refused_request_s_trace_says_why_and_reaches_no_replica(service: Service, collector: Collector) -> None:
    trace, headers = new_trace()
    reply = service.http.post("/models/demo/nobody-has-this", json={"inputs": PROMPT}, headers=headers)
    assert reply.status_code == 404
    spans = collected(collector, trace, {"request", "resolve"})
    assert set(spans) == {"request", "resolve"}
    assert spans["request"].facts["loraplex.code"] == spans["resolve"].facts["error.type"] == "model_not_found"


def test_callers_who_ask_for_no_trace_leave_none(service: Service, collector: Collector) -> None:
    before = {span.trace for span in collector.spans}
    assert service.ask(PROMPT, model="demo/sd15", seed=1).status_code == 200
    assert httpx.get(service.url, trust_env=False, timeout=WAIT_S).status_code == 200
    # What is asked for after it arrives after it.
    trace, headers = new_trace()
    assert service.http.post("/models/demo/sd15", json={"inputs": PROMPT}, headers=headers).status_code == 200
    collected(collector, trace, PARTS)
    assert {span.trace for span in collector.spans} - before == {trace}

"""Metrics through Serve's own metric classes, which check names and labels; every value is recorded."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from ray.serve import metrics

from serve_app.core import AdapterSpec, GenerationRequest, GenerationResult, HubToken, ScaledAdapter, Timings
from serve_app.observability.metrics import (
    DECLARED,
    FORMER_NAMES,
    AdapterMetrics,
    IngressMetrics,
    MetricFactory,
    ProxyMetrics,
    ReplicaMetrics,
    RouterMetrics,
    TracingMetrics,
)

Labels = dict[str, str]


class Remembered:
    """Told of every value, after Ray has accepted it."""

    points: ClassVar[list[tuple[str, float, Labels]]] = []

    @classmethod
    def note(cls, metric: Any, value: float, labels: Labels) -> None:
        assert set(labels) == set(metric.info["tag_keys"]), metric.info["name"]
        cls.points.append((metric.info["name"], value, labels))


class Counter(metrics.Counter):
    def inc(self, value: float = 1.0, tags: Labels | None = None) -> None:
        super().inc(value, tags)
        Remembered.note(self, value, tags or {})


class Gauge(metrics.Gauge):
    def set(self, value: float, tags: Labels | None = None) -> None:
        super().set(value, tags)
        Remembered.note(self, value, tags or {})


class Histogram(metrics.Histogram):
    def observe(self, value: float, tags: Labels | None = None) -> None:
        super().observe(value, tags)
        Remembered.note(self, value, tags or {})


METERS = MetricFactory(Counter, Gauge, Histogram)


@pytest.fixture(autouse=True)
def points() -> list[tuple[str, float, Labels]]:
    Remembered.points.clear()
    return Remembered.points


def test_names_follow_the_rules_of_prometheus_and_are_distinct() -> None:
    names = [declared.name for declared in DECLARED]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"loraplex_([a-z]+_)?[a-z]+(_(seconds|bytes|images))?", name) for name in names)


def test_no_label_but_one_can_take_as_many_values_as_there_are_adapters() -> None:
    labels = {label for declared in DECLARED for label in declared.labels}
    few = {"route", "status", "base", "code", "tier", "source", "stage", "outcome", "reason"}
    assert labels <= few | {"adapter", "share"}
    assert {one.name for one in DECLARED if "adapter" in one.labels} == {
        "loraplex_adapter_requests",
        "loraplex_adapter_device_seconds",
    }


def drawn(*adapters: str, token: HubToken | None = None) -> tuple[GenerationRequest, GenerationResult]:
    """A request for two of the four images of a pass of 2 s, and its result."""
    uses = tuple(
        ScaledAdapter(AdapterSpec(id_, "demo/sd15", "1" * 40, "a.safetensors", "hub", id_, 1), 1.0) for id_ in adapters
    )
    request = GenerationRequest(
        "r", "demo/sd15", "a cat", None, uses, 64, 64, 9, 7.5, None, 1, num_images=2, hub_token=token
    )
    return request, GenerationResult("r", "demo/sd15", (), (1, 2), (), Timings(), 2.0, "cpu", 4, device_s=1.0)


def test_requests_and_device_time_are_counted_for_each_of_a_request_s_adapters(
    points: list[tuple[str, float, Labels]],
) -> None:
    AdapterMetrics(2, clock=lambda: 0.0, factory=METERS).drawn(*drawn("acme/oil", "acme/ink"))
    assert points == [
        (name, value, {"base": "demo/sd15", "adapter": adapter})
        for adapter in ("acme/oil", "acme/ink")
        for name, value in (("loraplex_adapter_requests", 1), ("loraplex_adapter_device_seconds", 1.0))
    ]


def test_a_walk_through_a_thousand_adapters_tells_the_names_of_no_more_than_the_configured_number(
    points: list[tuple[str, float, Labels]],
) -> None:
    metrics = AdapterMetrics(3, clock=lambda: 0.0, factory=METERS)
    for index in range(1000):
        metrics.drawn(*drawn(f"acme/{index}"))
    told = {labels["adapter"] for _, _, labels in points}
    assert told == {"acme/0", "acme/1", "acme/2", "other"}


def test_an_adapter_that_not_everybody_may_read_is_counted_without_its_name(
    points: list[tuple[str, float, Labels]],
) -> None:
    metrics = AdapterMetrics(3, clock=lambda: 0.0, factory=METERS)
    metrics.drawn(*drawn("acme/secret", token=HubToken("hf_x")))
    assert {labels["adapter"] for _, _, labels in points} == {"private"}


def test_an_answer_is_counted_by_route_status_and_base(points: list[tuple[str, float, Labels]]) -> None:
    ingress = IngressMetrics(METERS)
    ingress.answered(route="/models/{model}", status=200, base_id="demo/sd15")
    ingress.answered(route="/models/{model}", status=404, base_id=None)
    assert points == [
        ("loraplex_requests", 1, {"route": "/models/{model}", "status": "200", "base": "demo/sd15"}),
        ("loraplex_requests", 1, {"route": "/models/{model}", "status": "404", "base": "none"}),
    ]


def test_refusals_are_counted_by_code_and_retries_by_base(points: list[tuple[str, float, Labels]]) -> None:
    ingress = IngressMetrics(METERS)
    ingress.refused("model_not_found")
    ingress.retried("demo/sd15", "stalled")
    assert points == [
        ("loraplex_refusals", 1, {"code": "model_not_found"}),
        ("loraplex_retries", 1, {"base": "demo/sd15", "reason": "stalled", "why": "stalled"}),
    ]


def test_the_times_of_a_request_are_reported_in_seconds(points: list[tuple[str, float, Labels]]) -> None:
    timings = Timings(queue_ms=1000, fetch_ms=2000, swap_ms=3000, denoise_ms=4000, decode_ms=5000, suspended_ms=6000)
    ReplicaMetrics("demo/sd15", METERS).served(timings, batch_size=2)
    base = {"base": "demo/sd15"}
    assert points == [
        ("loraplex_queue_seconds", 1.0, base),
        ("loraplex_fetch_seconds", 2.0, base),
        ("loraplex_swap_seconds", 3.0, base),
        ("loraplex_denoise_seconds", 4.0, base),
        ("loraplex_decode_seconds", 5.0, base),
        ("loraplex_batch_images", 2, base),
        ("loraplex_suspended_seconds", 6.0, base),
        ("loraplex_slowdown", pytest.approx((1 + 6 + 3 + 4 + 5) / (3 + 4 + 5)), base),
    ]


def test_adapters_are_counted_by_the_tier_they_were_found_on_under_the_former_name_too(
    points: list[tuple[str, float, Labels]],
) -> None:
    ReplicaMetrics("demo/sd15", METERS).adapter_found("disk")
    labels = {"base": "demo/sd15", "tier": "disk"}
    assert points == [("loraplex_adapter_lookups", 1, labels), ("loraplex_adapters", 1, labels)]


@pytest.mark.parametrize(
    ("count", "labels"),
    [
        (lambda: ReplicaMetrics("b", METERS).file_fetched("peer"), {"source": "peer", "tier": "peer", "base": "b"}),
        (lambda: RouterMetrics("b", METERS).routed("host"), {"tier": "host", "place": "host", "base": "b"}),
        (lambda: ProxyMetrics(METERS).lost("cut"), {"outcome": "cut", "result": "cut"}),
        (lambda: TracingMetrics(METERS).sent(1, True), {"outcome": "sent", "result": "sent"}),
        (lambda: IngressMetrics(METERS).access_checked("ok"), {"outcome": "ok", "result": "ok"}),
    ],
)
def test_a_label_with_a_new_name_is_exported_under_both(
    points: list[tuple[str, float, Labels]], count: Callable[[], None], labels: Labels
) -> None:
    count()
    assert [found for _, _, found in points] == [labels]


def test_requests_given_up_are_counted_by_how_far_they_were(points: list[tuple[str, float, Labels]]) -> None:
    ReplicaMetrics("demo/sd15", METERS).cancelled("fetching")
    assert points == [("loraplex_cancelled", 1, {"base": "demo/sd15", "stage": "fetching"})]


def test_evictions_are_counted_once_however_often_the_tier_reports(
    points: list[tuple[str, float, Labels]],
) -> None:
    replica = ReplicaMetrics("demo/sd15", METERS)
    for evictions in (0, 2, 2, 5):
        replica.host_tier(used_bytes=100, evictions=evictions)
    counted = [value for name, value, _ in points if name == "loraplex_evictions"]
    assert counted == [2, 3]
    assert [value for name, value, _ in points if name == "loraplex_resident_bytes"] == [100] * 4


def test_self_checks_are_counted_once_however_often_they_are_reported(
    points: list[tuple[str, float, Labels]],
) -> None:
    replica = ReplicaMetrics("demo/sd15", METERS)
    for sound, is_corrupt in ((0, False), (2, False), (2, False), (3, True), (3, True)):
        replica.self_checked(sound=sound, is_corrupt=is_corrupt)
    assert [(value, labels["outcome"]) for _, value, labels in points] == [(2, "ok"), (1, "ok"), (1, "mismatch")]


def test_every_declared_metric_is_reported_by_someone(points: list[tuple[str, float, Labels]]) -> None:
    ingress, replica = IngressMetrics(METERS), ReplicaMetrics("demo/sd15", METERS)
    ingress.answered(route="/", status=200, base_id=None)
    ingress.refused("internal")
    ingress.retried("demo/sd15", "died")
    ingress.aliases_known(1)
    ingress.start_waited("demo/sd15", "refused")
    ingress.access_checked("ok")
    replica.served(Timings(denoise_ms=1.0), batch_size=1)
    replica.shared("", 1.0, images=1)
    replica.changed(changes=1, changing_s=1.0)
    replica.adapter_found("host")
    replica.file_fetched("hub")
    replica.base_fetched({"peer": 1})
    replica.host_tier(used_bytes=1, evictions=1)
    replica.cancelled("queued")
    replica.self_checked(sound=1, is_corrupt=False)
    replica.quarantined(1)
    replica.out_of_memory(recovered=1, refused=0)
    replica.worked(backlog_s=1.0, predicted_s=1.0, busy_s=1.0)
    replica.started(start_s=1.0, warmed=1)
    RouterMetrics("demo/sd15", METERS).routed("host")
    AdapterMetrics(1, clock=lambda: 0.0, factory=METERS).drawn(*drawn("acme/oil"))
    TracingMetrics(METERS).sent(3, True)
    ProxyMetrics(METERS).lost("resent")
    assert {name for name, _, _ in points} == {declared.name for declared in DECLARED} | set(FORMER_NAMES.values())


def test_a_request_s_slowdown_counts_its_waits_against_its_time_on_the_device(points: Any) -> None:
    timings = Timings(queue_ms=500.0, suspended_ms=1500.0, swap_ms=100.0, denoise_ms=800.0, decode_ms=100.0)
    ReplicaMetrics("demo/sd15", METERS).served(timings, batch_size=1)
    assert ("loraplex_slowdown", 3.0, {"base": "demo/sd15"}) in Remembered.points


def test_callers_shares_of_a_device_are_told_by_few_hashes(points: Any) -> None:
    Remembered.points.clear()
    replica = ReplicaMetrics("demo/sd15", METERS, clock=lambda: 0.0)
    for number in range(100):
        replica.shared(f"{number:016x}", 1.0, images=2)
    replica.shared("", 2.0, images=2)
    told = [labels["share"] for name, _, labels in Remembered.points if name == "loraplex_share_device_seconds"]
    assert len(set(told)) == 16 + 2
    assert told[-1] == "none"
    assert told.count("other") == 84
    images = [labels["share"] for name, _, labels in Remembered.points if name == "loraplex_share_images"]
    assert images == told

from __future__ import annotations

import contextlib
import pickle
from dataclasses import replace
from typing import Any

import pytest

from serve_app.routing.cost import BASE_ALONE, STALLED_S, composition_of
from serve_app.routing.stats import HEARTBEAT_S, ReplicaStats, RoutingStatsCollector, decode, request_tag
from tests.routing_cases import device, generation


class Bench:
    """A collector with a clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.collector = RoutingStatsCollector(clock=lambda: self.now_s, deprioritize_after_s=60.0)

    def report(self, **load: Any) -> ReplicaStats:
        stats = decode(self.collector.snapshot(device(**load)))
        assert stats is not None
        return stats


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_an_accepted_request_is_counted_until_it_ends(bench: Bench) -> None:
    request = generation(0, "a")
    with bench.collector.accepted(request):
        assert bench.report().counted == {request_tag(request)}
    assert not bench.report().counted


def test_compositions_of_accepted_requests_are_fused_and_the_last_one_stays(bench: Bench) -> None:
    assert bench.report().fused == {BASE_ALONE}
    first, second = generation(0, "a"), generation(1, "b")
    with bench.collector.accepted(first):
        with bench.collector.accepted(second):
            assert {composition_of(first), composition_of(second)} <= bench.report().fused
        assert bench.report().fused == {composition_of(first), composition_of(second)}
    assert bench.report().fused == {composition_of(first)}


def test_the_parts_of_one_request_are_told_apart() -> None:
    request = generation(0, "a")
    assert request_tag(request) != request_tag(replace(request, seed=1))


def test_without_news_the_report_is_the_same_object_until_the_next_heartbeat(bench: Bench) -> None:
    first = bench.collector.snapshot(device())
    bench.now_s += HEARTBEAT_S - 0.1
    assert bench.collector.snapshot(device(backlog_s=0.01)) is first
    bench.now_s += 0.1
    assert bench.collector.snapshot(device())["seq"] == first["seq"] + 1


def test_every_change_has_a_number_of_its_own(bench: Bench) -> None:
    assert [bench.report(backlog_s=backlog_s).sequence for backlog_s in (0.0, 1.0, 1.0, 2.0)] == [1, 2, 2, 3]


@pytest.mark.parametrize(("exact", "rough"), [(0.0, 0.0), (0.04, 0.0), (0.26, 0.3), (12.34, 12.0), (312.0, 310.0)])
def test_work_ahead_is_rounded(bench: Bench, exact: float, rough: float) -> None:
    assert bench.report(backlog_s=exact).ahead_s == rough


def test_a_busy_device_without_progress_is_reported_as_stalled_until_it_moves(bench: Bench) -> None:
    bench.report(backlog_s=1.0, progress=1.0, is_busy=True)
    bench.now_s += 61
    assert bench.report(backlog_s=1.0, progress=1.0, is_busy=True).ahead_s == STALLED_S
    assert bench.report(backlog_s=1.0, progress=2.0, is_busy=True).ahead_s == 1.0


def test_an_idle_device_is_not_stalled(bench: Bench) -> None:
    bench.report(progress=1.0)
    bench.now_s += 61
    assert bench.report(progress=1.0).ahead_s == 0


def test_a_report_of_eight_requests_is_small(bench: Bench) -> None:
    with contextlib.ExitStack() as accepted:
        for number in range(8):
            accepted.enter_context(bench.collector.accepted(generation(number, "a", "b")))
        assert len(pickle.dumps(bench.collector.snapshot(device(12.3)))) < 350

"""The images of a request go where each would end first, and only where that ends the request clearly sooner."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.routing.cost import STALLED_S, RequestLoad
from serve_app.routing.spread import parts_of, spread_images, work_to_keep_s
from serve_app.work import LatencyModel
from tests.routing_cases import generation, view

SECOND_EACH = LatencyModel(fixed_s=0.0, unit_s=1.0)


def spread(count: int, image_units: float, waits_s: list[float], pace: LatencyModel = SECOND_EACH) -> tuple[int, ...]:
    return spread_images(count, RequestLoad((), count * image_units), [(wait_s, pace) for wait_s in waits_s])


def test_images_fill_idle_replicas_and_leave_the_busy_one_alone() -> None:
    assert spread(8, 4.0, [0.0, 0.0, 100.0, 0.0]) == (3, 3, 2)


def test_a_request_that_would_end_hardly_sooner_stays_whole() -> None:
    assert spread(4, 1.0, [0.0, 2.8]) == (4,)


def test_one_image_is_one_part_and_so_is_all_where_one_replica_is_known_or_none() -> None:
    assert spread(1, 4.0, [3.0, 1.0, 2.0]) == (1,)
    assert spread(8, 4.0, [3.0]) == spread(8, 4.0, []) == (8,)


def test_a_replica_without_the_adapter_counts_with_the_fetch_and_a_stalled_one_not_at_all() -> None:
    request = replace(generation(0, "a"), num_images=4, steps=1)
    assert parts_of(request, [view("r0", held=("a",)), view("r1")]) == (4,)
    assert parts_of(request, [view("r0", held=("a",)), view("r1", held=("a",))]) == (2, 2)
    assert parts_of(request, [view("r0", held=("a",)), view("r1", STALLED_S, held=("a",))]) == (4,)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 16), st.floats(0.01, 50), st.lists(st.floats(0, 300), min_size=1, max_size=12), st.floats(0, 2))
def test_no_image_is_lost_and_no_request_ends_later_for_being_spread(
    count: int, units: float, waits_s: list[float], fixed_s: float
) -> None:
    pace = LatencyModel(fixed_s, 0.5)
    counts = spread(count, units, waits_s, pace)
    assert sum(counts) == count
    ends_s = sorted(waits_s)[: len(counts)]
    for part in counts:  # the largest where it is free first
        ends_s.append(ends_s.pop(0) + pace.seconds(units * part))
    assert max(ends_s[-len(counts) :]) <= min(waits_s) + pace.seconds(units * count) + 1e-6


def test_when_a_replica_joins_each_keeps_the_mean_work_of_those_that_get_on() -> None:
    assert work_to_keep_s([view("r0", 9.0), view("r1", 3.0), view("r2", 0.0)]) == 4.0
    assert work_to_keep_s([view("r0", STALLED_S), view("r1", 0.0)]) == 0.0, "the stalled one gives back all"
    assert work_to_keep_s([view("r0", STALLED_S), view("r1", STALLED_S)]) is None
    assert work_to_keep_s([view("r0", 9.0)]) is None

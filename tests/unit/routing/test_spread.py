"""The images of a request go where each would end first, and only where that ends the request clearly sooner."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.routing.spread import spread_images
from serve_app.work import LatencyModel

SECOND_EACH = LatencyModel(fixed_s=0.0, unit_s=1.0)


def test_images_fill_idle_replicas_and_leave_the_busy_one_alone() -> None:
    assert spread_images(8, 4.0, [0.0, 0.0, 100.0, 0.0], SECOND_EACH) == (3, 3, 0, 2)


def test_a_request_that_would_end_hardly_sooner_stays_whole() -> None:
    assert spread_images(4, 1.0, [0.0, 2.8], SECOND_EACH) == (4, 0)


def test_one_image_goes_to_the_least_backlog() -> None:
    assert spread_images(1, 4.0, [3.0, 1.0, 2.0], SECOND_EACH) == (0, 1, 0)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 16), st.floats(0.01, 50), st.lists(st.floats(0, 300), min_size=1, max_size=12), st.floats(0, 2))
def test_no_image_is_lost_and_no_request_ends_later_for_being_spread(
    count: int, units: float, backlogs_s: list[float], fixed_s: float
) -> None:
    pace = LatencyModel(fixed_s, 0.5)
    counts = spread_images(count, units, backlogs_s, pace)
    assert sum(counts) == count
    ends_s = [backlog_s + pace.seconds(units * n) for backlog_s, n in zip(backlogs_s, counts, strict=True) if n]
    assert max(ends_s) <= min(backlogs_s) + pace.seconds(units * count) + 1e-6

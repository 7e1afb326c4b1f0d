"""What a caller is told to wait where a base is full."""

from __future__ import annotations

import contextlib

import pytest

from serve_app.deployments.ingress.backpressure import MAX_RETRY_AFTER_S, UNKNOWN_S, Backpressure
from tests.clock import Clock


def test_it_is_the_time_that_what_is_out_takes_at_the_rate_seen() -> None:
    clock = Clock()
    pressure = Backpressure(clock)
    with contextlib.ExitStack() as in_flight:
        for _ in range(9):
            in_flight.enter_context(pressure.track(2.0))
        for _ in range(5):
            with pressure.track(2.0):
                clock.now += 1.0
        assert pressure.retry_after_s() == pytest.approx(9, abs=1)


def test_before_anything_has_come_back_it_is_a_few_seconds() -> None:
    pressure = Backpressure(Clock())
    with pressure.track(2.0):
        assert pressure.retry_after_s() == UNKNOWN_S


def test_what_fails_is_not_work_done() -> None:
    clock = Clock()
    pressure = Backpressure(clock)
    for _ in range(3):
        with contextlib.suppress(RuntimeError), pressure.track(2.0):
            clock.now += 1.0
            raise RuntimeError
    assert pressure.retry_after_s() == UNKNOWN_S


def test_it_stays_within_bounds_and_idle_time_does_not_count() -> None:
    clock = Clock()
    pressure = Backpressure(clock)
    with pressure.track(1.0):
        clock.now += 1.0
    clock.now += 1e6
    with pressure.track(3.0):
        assert pressure.retry_after_s() == 3
    with pressure.track(1e9):
        assert pressure.retry_after_s() == MAX_RETRY_AFTER_S
    assert pressure.retry_after_s() == 1


def test_a_base_counts_as_full_for_a_moment_after_a_refusal() -> None:
    clock = Clock()
    pressure = Backpressure(clock)
    with pressure.track(1.0):
        assert not pressure.was_full_lately
        pressure.record_rejection()
        assert (pressure.was_full_lately, pressure.in_flight) == (True, 1)
    clock.now += 1.1
    assert (pressure.was_full_lately, pressure.in_flight) == (False, 0)


def test_what_is_out_is_known_by_caller() -> None:
    pressure = Backpressure(Clock())
    with pressure.track(1.0, "a"), pressure.track(1.0, "a"):
        with pressure.track(1.0, "b"):
            assert (pressure.held_by("a"), pressure.held_by("b")) == (2, 1)
        assert (pressure.held_by("a"), pressure.held_by("b")) == (2, 0)
    assert pressure.held_by("a") == 0

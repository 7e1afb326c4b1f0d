"""The books of a worker's work, in simulated time."""

from __future__ import annotations

import pytest

from serve_app.engine.worker.pace import LOAD_WINDOW_S, LoadTracker, guess_of
from serve_app.work import LatencyModel

GUESS = LatencyModel(fixed_s=1.0, unit_s=1.0)


def test_the_backlog_is_what_is_left_of_the_pass_and_all_that_follows() -> None:
    books = LoadTracker(GUESS, typical_units=2.0)
    books.begun(4.0, now_s=10.0)
    books.add_pending(2.0)
    assert books.backlog_s([3.0, 5.0], now_s=12.0) == (5 - 2) + (4 + 6) + 3
    assert books.backlog_s([], now_s=99.0) == 3  # a pass that takes longer than predicted is nearly over
    books.remove_pending(2.0)
    books.ended(13.0, denoise_s=None)
    assert books.backlog_s([], now_s=13.0) == 0


def test_a_pass_corrects_the_guess_and_both_are_kept_for_comparison() -> None:
    books = LoadTracker(GUESS, typical_units=2.0)
    assert books.measured is None
    books.begun(4.0, now_s=0.0)
    books.ended(10.0, denoise_s=8.0)
    assert books.measured == LatencyModel(fixed_s=2.0, unit_s=2.0)
    state = books.snapshot([], now_s=10.0)
    assert (state.predicted_s, state.busy_s) == (5.0, 10.0)


def test_a_pass_that_failed_teaches_nothing() -> None:
    books = LoadTracker(GUESS, typical_units=2.0)
    books.begun(4.0, now_s=0.0)
    books.ended(100.0, denoise_s=None)
    assert books.pace == GUESS
    assert books.snapshot([], now_s=100.0).busy_s == 0


def test_the_load_is_the_work_that_arrives_in_seconds_a_second() -> None:
    books = LoadTracker(GUESS, typical_units=2.0)
    # A request of one unit is two seconds of work; one comes every four seconds.
    for index in range(200):
        books.arrived(1.0, now_s=4.0 * index)
    assert books.snapshot([], now_s=800.0).load == pytest.approx(0.5, rel=0.1)
    assert books.snapshot([], now_s=800.0 + 10 * LOAD_WINDOW_S).load < 0.001


def test_the_mean_request_is_that_of_late() -> None:
    books = LoadTracker(GUESS, typical_units=2.0)
    assert books.snapshot([], now_s=0.0).request_s == 3.0
    for index in range(100):
        books.arrived(3.0 if index > 20 else 50.0, now_s=float(index))
    assert books.snapshot([], now_s=100.0).request_s == pytest.approx(4.0, rel=0.05)


def test_the_guess_for_a_gpu_is_faster() -> None:
    assert guess_of("cuda").seconds(50) < guess_of("cpu").seconds(50)

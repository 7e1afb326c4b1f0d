"""What a change of adapters took on a GPU is told once the device is through with it, and nothing waits for that."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch

from serve_app.engine.worker.swap_timer import SwapTimer, TimedSwap, recorder_of


class Event:
    """A timing event of a pretended device: it lies `at_ms` on the device's clock, once that has come so far."""

    device_ms = 0.0

    def __init__(self, at_ms: float) -> None:
        self.at_ms = at_ms

    def query(self) -> bool:
        return self.at_ms <= Event.device_ms

    def elapsed_time(self, end: Event) -> float:
        assert self.query()
        assert end.query()
        return end.at_ms - self.at_ms


def test_on_a_gpu_a_change_is_told_when_its_events_are_over_with_the_time_of_the_device() -> None:
    Event.device_ms = 0.0
    places = iter([0.0, 12.0, 20.0, 25.0])
    timer = SwapTimer[str](count(step=0.001).__next__, lambda: Event(next(places)))
    for owner, was_kept in (("first", False), ("second", True)):
        timer.begin()
        timer.end(owner, was_kept=was_kept)
    assert list(timer.finished()) == []
    Event.device_ms = 24.0
    assert list(timer.finished()) == [TimedSwap("first", 0.012, was_kept=False)]
    assert list(timer.finished()) == []
    Event.device_ms = 30.0
    assert list(timer.finished()) == [TimedSwap("second", 0.005, was_kept=True)]


def test_on_a_cpu_a_change_is_told_at_once_with_the_time_of_the_host() -> None:
    record: Any = recorder_of(torch.device("cpu"))
    assert record is None
    timer = SwapTimer[str](iter([1.0, 1.5]).__next__, record)
    timer.begin()
    timer.end("run", was_kept=False)
    assert list(timer.finished()) == [TimedSwap("run", 0.5, was_kept=False)]

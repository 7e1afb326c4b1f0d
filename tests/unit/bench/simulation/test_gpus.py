"""Many bases on few GPUs in simulated time: all are answered, and none waits for longer than is told."""

from __future__ import annotations

import pytest

from serve_app.autoscaling.sharing import longest_wait
from serve_app.bench.simulation.gpus import ROUND_S, Call, GpuSimulation, Sharing, pinned

START_S, TAKES_S = 5.0, 8.0
# Until it is seen that a base waits, until the others are asked, and until Serve has followed each.
SEEN_AFTER_S = 5 * ROUND_S


def steady(bases: int, each_s: float, until_s: float) -> list[Call]:
    """Return calls that keep every base busy all the time."""
    count = int(until_s / each_s)
    return [
        Call(number * each_s + base / bases, f"base-{base}", TAKES_S)
        for number in range(count)
        for base in range(bases)
    ]


@pytest.mark.parametrize(("bases", "gpus"), [(3, 2), (8, 4), (9, 2)])
def test_no_base_waits_for_longer_than_is_told_though_all_are_busy_all_the_time(bases: int, gpus: int) -> None:
    calls = steady(bases, each_s=10.0, until_s=300.0)
    sharing = Sharing(gpus, START_S, max_ongoing=2)
    outcome = GpuSimulation([f"base-{base}" for base in range(bases)], sharing).run(calls)
    assert len(outcome.latencies_s) == len(calls)
    limit = longest_wait([(0, 1.0)] * bases, gpus)
    assert limit
    assert max(outcome.waits_s) <= limit.seconds(start_s=START_S, drain_s=2 * TAKES_S) + SEEN_AFTER_S * limit.drains
    # Between two turns of a base others had theirs: nothing came and went for nothing.
    assert outcome.starts <= outcome.lasted_s / ((START_S + TAKES_S) * 2) * gpus + bases


def test_an_idle_base_gives_way_long_before_its_delay() -> None:
    calls = [Call(0.0, "a", TAKES_S), Call(60.0, "b", TAKES_S)]
    outcome = GpuSimulation(["a", "b"], Sharing(1, START_S, downscale_delay_s=3600.0)).run(calls)
    assert outcome.waits_s[1] <= START_S + SEEN_AFTER_S
    assert (outcome.starts, outcome.taken) == (2, 1)


def test_with_enough_gpus_nothing_is_taken_and_nothing_comes_back() -> None:
    calls = steady(3, each_s=30.0, until_s=300.0)
    outcome = GpuSimulation(["base-0", "base-1", "base-2"], Sharing(3, START_S)).run(calls)
    assert (outcome.taken, outcome.back, outcome.starts) == (0, 0, 3)


def test_a_pinned_base_waits_for_its_own_gpu() -> None:
    calls = [Call(0.0, "a", 10.0), Call(0.0, "b", 9.0), Call(1.0, "c", 3.0), Call(2.0, "a", 10.0)]
    assert sorted(pinned(calls, 2, start_s=5.0, patience_s=0.0)) == [14.0, 15.0, 21.0, 23.0]

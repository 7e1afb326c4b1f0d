"""Traffic that is drawn is like the traffic that was published, and the same for everyone."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace

import pytest

from serve_app.bench.measuring.options import BenchmarkRefused
from serve_app.bench.traffic.workload import DAY_S, AdapterAsk, Arrival, Traffic, Workload, generate, named_traffic
from serve_app.bench.traffic.workload_statistics import (
    Statistic,
    calibration,
    distinct_in_windows,
    lru_miss_rate,
    quantile,
    statistics_of,
    zipf_exponent,
)

SMALL = replace(Traffic(), requests=400, users=30)
MANY_BASES = (("sdxl", 31.0), ("flux", 20.0), ("sd15", 20.0), ("pony", 15.0), ("sd21", 14.0))


def test_same_seed_gives_the_same_traffic_and_another_seed_another() -> None:
    assert generate(SMALL, 3) == generate(SMALL, 3)
    assert generate(SMALL, 3) != generate(SMALL, 4)


def test_as_many_requests_come_in_order_within_the_day_as_were_asked_for() -> None:
    arrivals = generate(SMALL, 0).arrivals
    times = [arrival.at_s for arrival in arrivals]
    assert len(arrivals) == 400
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < DAY_S


def test_the_mean_of_four_seeds_meets_every_published_target() -> None:
    found: dict[str, list[Statistic]] = {}
    for seed in range(4):
        for one in calibration(Traffic(bases=MANY_BASES), seed):
            found.setdefault(one.name, []).append(one)
    means = [replace(ones[0], value=statistics.fmean(one.value for one in ones)) for ones in found.values()]
    assert len(means) > 25
    assert [one for one in means if not one.is_met] == []


def test_traffic_without_sessions_is_told_apart() -> None:
    shuffled = calibration(Traffic(keep_set=0.0, known=0.0, again=0.0), 0)
    outside = {one.name for one in shuffled if one.is_met is False}
    assert {"misses of an LRU of 8, in order of time", "same adapters as the request before"} <= outside


def test_the_blog_s_adapters_are_mostly_for_one_base_and_its_requests_draw_one_image() -> None:
    arrivals = generate(named_traffic("blog"), 0).arrivals
    bases = {ask.key: arrival.base_id for arrival in arrivals for ask in arrival.adapters}
    assert Counter(bases.values())["sdxl"] / len(bases) == pytest.approx(0.92, abs=0.04)
    assert {arrival.images for arrival in arrivals} == {1}


def test_adapters_of_one_request_are_distinct_and_for_its_base() -> None:
    traffic = replace(SMALL, several=((3, 1.0),), bases=MANY_BASES)
    arrivals = generate(traffic, 0).arrivals
    base_of = {}
    for arrival in arrivals:
        keys = [ask.key for ask in arrival.adapters]
        assert len(set(keys)) == len(keys)
        for key in keys:
            assert base_of.setdefault(key, arrival.base_id) == arrival.base_id
    assert max(len(arrival.adapters) for arrival in arrivals) == 3


def test_more_requests_bring_more_users() -> None:
    assert Traffic().scaled(44_940, 1000).users == 10 * Traffic().users


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"requests": 0}, "at least one request"),
        ({"keep_base": 0.5}, "keep_base 0.5 is under keep_set 0.76"),
        ({"hours": (1.0,)}, "24 hours"),
    ],
)
def test_parameters_that_describe_no_traffic_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(BenchmarkRefused, match=said):
        generate(replace(Traffic(), **wrong), 0)


def test_an_unknown_traffic_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BenchmarkRefused, match="there is no traffic 'night'; there are day, blog"):
        named_traffic("night")


def arrivals_of(*keys: str, every_s: float = 1.0) -> Workload:
    return Workload(
        tuple(Arrival(number * every_s, "b", (AdapterAsk(key),)) for number, key in enumerate(keys)),
        dict.fromkeys(keys, 1),
    )


def test_misses_are_counted_as_by_hand() -> None:
    assert lru_miss_rate(arrivals_of("a", "b", "a", "c", "b", "a").arrivals, size=2) == pytest.approx(5 / 6)


def test_distinct_adapters_are_counted_window_by_window() -> None:
    workload = arrivals_of("a", "b", "a", "a", "a", "a", every_s=10.0)
    assert distinct_in_windows(workload, 20.0, 1.0) == 2
    assert distinct_in_windows(workload, 20.0, 0.5) == 1


def test_an_exponent_is_found_again() -> None:
    assert zipf_exponent([round(10_000 * rank**-0.9) for rank in range(1, 200)]) == pytest.approx(0.9, abs=0.01)


def test_quantiles_are_values_that_occurred() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.5, 0.51, 0.95)] == [1.0, 2.0, 3.0, 4.0]


def test_statistics_of_any_workload_name_its_work() -> None:
    found = {one.name: one.value for one in statistics_of(arrivals_of("a", "b"))}
    assert found["requests"] == found["distinct adapters"] == 2
    assert found["megapixel-steps per request, mean"] == pytest.approx(30 * 1.048576)

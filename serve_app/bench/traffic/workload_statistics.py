"""Statistics of a workload, compared with those of real traffic.

Owns the statistics and their published targets. Must not draw anything but the shuffle of one comparison.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from serve_app.bench.traffic.workload import HOUR_S, Arrival, Traffic, Workload, generate

LRU_SIZE = 8


@dataclass(frozen=True, slots=True)
class Statistic:
    """One number of a workload; `target` is the published one, None where there is none, met within `tolerance`."""

    name: str
    value: float
    target: float | None = None
    tolerance: float = 0.2

    @property
    def is_met(self) -> bool | None:
        """Whether the value lies within the tolerance, a share of the target; None without a target."""
        if self.target is None:
            return None
        return abs(self.value - self.target) <= self.tolerance * abs(self.target)


def statistics_of(workload: Workload) -> tuple[Statistic, ...]:
    """Return what can be said of any workload, without targets."""
    arrivals = workload.arrivals
    used = [len(arrival.adapters) for arrival in arrivals if arrival.adapters]
    return (
        Statistic("requests", len(arrivals)),
        Statistic("distinct adapters", len(_keys(arrivals))),
        Statistic("distinct adapters per 2 min, median", distinct_in_windows(workload, 120.0, 0.5)),
        Statistic("distinct adapters per 2 min, p95", distinct_in_windows(workload, 120.0, 0.95)),
        Statistic("distinct adapters per 6 h, median", distinct_in_windows(workload, 6 * HOUR_S, 0.5)),
        Statistic("share of the most popular base", _top_base(arrivals)),
        Statistic("share of requests with one adapter", used.count(1) / max(len(used), 1)),
        Statistic("megapixel-steps per request, mean", statistics.fmean(_work(arrival) for arrival in arrivals)),
    )


def calibration(traffic: Traffic, seed: int) -> tuple[Statistic, ...]:
    """Draw the traffic as days in a row and laid over one another, and hold both against the published traces."""
    row, day = generate(replace(traffic, fold=False), seed), generate(replace(traffic, fold=True), seed)
    return (*_popularity(row), *_sessions(row), *_shapes(row), *_rhythm(row), *_folded(day))


def _popularity(row: Workload) -> tuple[Statistic, ...]:
    asked = [ask.key for arrival in row.arrivals for ask in arrival.adapters]
    counts = sorted(Counter(asked).values(), reverse=True)
    several: dict[str, set[float]] = {}
    for arrival in row.arrivals:
        for ask in arrival.adapters:
            several.setdefault(ask.key, set()).add(ask.scale)
    varied = sum(len(scales) > 1 for scales in several.values()) / max(len(several), 1)
    return (
        Statistic("adapters", len(counts), 389, 0.15),
        Statistic("share of the top 10 adapters", sum(counts[:10]) / len(asked), 0.29, 0.25),
        Statistic("Zipf exponent", zipf_exponent(counts), 0.88, 0.15),
        Statistic("adapters that appear at several scales", varied, 0.25, 0.3),
        Statistic("misses of an LRU of 8, in order of time", lru_miss_rate(row.arrivals), 0.20, 0.25),
        Statistic("misses of an LRU of 8, shuffled", lru_miss_rate(_shuffled(row.arrivals)), 0.90, 0.05),
    )


def _sessions(row: Workload) -> tuple[Statistic, ...]:
    sessions: dict[int, list[Arrival]] = {}
    for arrival in row.arrivals:
        sessions.setdefault(arrival.session, []).append(arrival)
    lengths = sorted(len(session) for session in sessions.values())
    pairs = [pair for session in sessions.values() for pair in zip(session, session[1:], strict=False)]
    gaps = [math.log(max(later.at_s - earlier.at_s, 1e-3)) for earlier, later in pairs]
    return (
        Statistic("sessions", len(sessions), 642, 0.15),
        Statistic("requests per session, mean", statistics.fmean(lengths), 7, 0.15),
        Statistic("requests per session, median", statistics.median(lengths), 3, 0.34),
        Statistic("requests per session, p90", quantile(lengths, 0.9), 17, 0.2),
        Statistic("requests per session, longest", lengths[-1], 78, 0.1),
        Statistic("ln of the gap in a session, mean", statistics.fmean(gaps), 4.67, 0.05),
        Statistic("ln of the gap in a session, deviation", statistics.stdev(gaps), 1.11, 0.1),
        Statistic("same adapters as the request before", _share(pairs, _set), 0.76, 0.06),
        *_same_base(row, pairs),
    )


def _same_base(row: Workload, pairs: Sequence[tuple[Arrival, Arrival]]) -> tuple[Statistic, ...]:
    if len(row.bases) == 1:
        return ()
    return (Statistic("same base as the request before", _share(pairs, lambda a: a.base_id), 0.94, 0.05),)


def _shapes(row: Workload) -> tuple[Statistic, ...]:
    count = len(row.arrivals)
    images = Counter(arrival.images for arrival in row.arrivals)
    used = Counter(len(arrival.adapters) for arrival in row.arrivals)
    steps = Counter(arrival.steps for arrival in row.arrivals)
    return (
        Statistic("share with one adapter", used[1] / count, 0.934, 0.04),
        Statistic("share with two adapters", used[2] / count, 0.057, 0.5),
        Statistic("share with 30 steps", steps[30] / count, 0.91, 0.05),
        *(
            Statistic(f"share with {number} images", images[number] / count, share, 0.15)
            for number, share in ((1, 0.58), (2, 0.08), (4, 0.19), (8, 0.15))
        ),
    )


def _rhythm(row: Workload) -> tuple[Statistic, ...]:
    hours = Counter(int(arrival.at_s // HOUR_S) for arrival in row.arrivals)
    mean = len(row.arrivals) / max(math.ceil(row.duration_s / HOUR_S), 1)
    return (Statistic("busiest hour over the mean hour", max(hours.values()) / mean, 9, 0.3),)


def _folded(day: Workload) -> tuple[Statistic, ...]:
    return (
        Statistic("one day: distinct per 2 min, median", distinct_in_windows(day, 120.0, 0.5), 7, 0.3),
        Statistic("one day: distinct per 2 min, p95", distinct_in_windows(day, 120.0, 0.95), 19, 0.3),
        Statistic("one day: distinct per 6 h, median", distinct_in_windows(day, 6 * HOUR_S, 0.5), 152, 0.2),
        Statistic("one day: variation within an hour", _variation(day), 1.07, 0.15),
    )


def distinct_in_windows(workload: Workload, window_s: float, share: float) -> float:
    """Return a quantile of the number of distinct adapters over windows that touch; empty ones do not count."""
    windows: dict[int, set[str]] = {}
    for arrival in workload.arrivals:
        windows.setdefault(int(arrival.at_s // window_s), set()).update(ask.key for ask in arrival.adapters)
    return quantile(sorted(len(keys) for keys in windows.values() if keys), share)


def lru_miss_rate(arrivals: Iterable[Arrival], size: int = LRU_SIZE) -> float:
    """Return how often an adapter is not among the `size` last used ones of the whole service."""
    held: OrderedDict[str, None] = OrderedDict()
    asked = missed = 0
    for arrival in arrivals:
        for ask in arrival.adapters:
            asked += 1
            missed += ask.key not in held
            held[ask.key] = None
            held.move_to_end(ask.key)
            if len(held) > size:
                held.popitem(last=False)
    return missed / max(asked, 1)


def zipf_exponent(counts: Sequence[int]) -> float:
    """Return the exponent of popularity by rank, by least squares over the ranks that were asked for three times."""
    points = [(math.log(rank), math.log(count)) for rank, count in enumerate(counts, 1) if count >= 3]
    if len(points) < 3:
        return math.nan
    return -statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the sorted values do not exceed; nan of none."""
    if not ordered:
        return math.nan
    return float(ordered[min(max(math.ceil(share * len(ordered)) - 1, 0), len(ordered) - 1)])


def _variation(workload: Workload) -> float:
    """Return the coefficient of variation of the gaps between arrivals, hour by hour, weighted by arrivals."""
    hours: dict[int, list[float]] = {}
    for earlier, later in zip(workload.arrivals, workload.arrivals[1:], strict=False):
        hours.setdefault(int(earlier.at_s // HOUR_S), []).append(later.at_s - earlier.at_s)
    kept = [gaps for gaps in hours.values() if len(gaps) >= 30]
    weighed = sum(len(gaps) * statistics.stdev(gaps) / statistics.fmean(gaps) for gaps in kept)
    return weighed / max(sum(len(gaps) for gaps in kept), 1)


def _share(pairs: Sequence[tuple[Arrival, Arrival]], what: Callable[[Arrival], object]) -> float:
    return sum(what(earlier) == what(later) for earlier, later in pairs) / max(len(pairs), 1)


def _set(arrival: Arrival) -> frozenset[str]:
    return frozenset(ask.key for ask in arrival.adapters)


def _shuffled(arrivals: Sequence[Arrival]) -> list[Arrival]:
    shuffled = list(arrivals)
    random.Random(0).shuffle(shuffled)
    return shuffled


def _keys(arrivals: Iterable[Arrival]) -> set[str]:
    return {ask.key for arrival in arrivals for ask in arrival.adapters}


def _top_base(arrivals: Sequence[Arrival]) -> float:
    return Counter(arrival.base_id for arrival in arrivals).most_common(1)[0][1] / len(arrivals)


def _work(arrival: Arrival) -> float:
    return arrival.images * arrival.steps * arrival.width * arrival.height / 1e6

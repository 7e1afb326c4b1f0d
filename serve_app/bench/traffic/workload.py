"""Traffic as real services see it: sessions of users who stay with an adapter, drawn from a seed.

Owns the parameters and the drawing. Must not know replicas, clocks or the network. The defaults are fitted to the
published traces that `docs/capacity.md` names; `workload_statistics` holds what comes out against them.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from serve_app.bench.measuring.options import BenchmarkRefused

DAY_S = 86_400.0
HOUR_S = 3_600.0

# How busy each hour of the day is beside the others: a night, a morning, a steep peak in the afternoon.
HOURS = (
    0.05, 0.03, 0.02, 0.02, 0.03, 0.04, 0.08, 0.25, 0.70, 1.15, 1.45, 1.55,
    1.45, 1.70, 2.80, 4.50, 3.50, 1.80, 1.25, 1.05, 1.00, 0.60, 0.25, 0.08,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterAsk:
    """One adapter as a request asks for it; `key` names its bytes and is the same at any scale."""

    key: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the traffic, `at_s` seconds after its start; `user` is who sends it."""

    at_s: float
    base_id: str
    adapters: tuple[AdapterAsk, ...]
    steps: int = 30
    images: int = 1
    width: int = 1024
    height: int = 1024
    guidance_scale: float = 7.5
    user: int = 0
    session: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival, and the bytes of every adapter in them."""

    arrivals: tuple[Arrival, ...]
    sizes: dict[str, int] = field(repr=False)

    @property
    def duration_s(self) -> float:
        """The time of the last arrival."""
        return self.arrivals[-1].at_s if self.arrivals else 0.0

    @property
    def bases(self) -> tuple[str, ...]:
        """Every base that is asked for, in order of name."""
        return tuple(sorted({arrival.base_id for arrival in self.arrivals}))

    def of_base(self, base_id: str) -> Workload:
        """Return the requests of one base alone."""
        return Workload(tuple(a for a in self.arrivals if a.base_id == base_id), self.sizes)


@dataclass(frozen=True, slots=True)
class Traffic:
    """The parameters of a workload; the defaults are those of the calibrated day.

    `days` days are drawn and then laid over one another, so that the sessions of all of them meet in one day:
    `fold=False` leaves them in a row. `adapters` is how many there are, not all of which are asked for. Shares are
    pairs of a value and its weight. `known` is how often a user's session begins with adapters that the user has asked
    for before, `again` how often a change within a session goes back to some that the session has had. `burst_sigma`
    spreads single hours around the hour of the day (log-normal).
    """

    requests: int = 4_494
    days: float = 23.0
    fold: bool = True
    adapters: int = 640
    popularity: float = 0.82
    bases: tuple[tuple[str, float], ...] = (("sdxl", 1.0),)
    users: int = 239
    session_median: float = 3.0
    session_sigma: float = 1.37
    session_max: int = 78
    gap_log_mean: float = 4.67
    gap_log_sd: float = 1.11
    keep_set: float = 0.76
    keep_base: float = 0.94
    known: float = 0.35
    again: float = 0.70
    burst_sigma: float = 0.35
    hours: tuple[float, ...] = HOURS
    several: tuple[tuple[int, float], ...] = ((1, 93.4), (2, 5.7), (3, 0.5), (4, 0.2), (5, 0.1), (6, 0.1))
    adapterless: float = 0.0
    images: tuple[tuple[int, float], ...] = ((1, 58.0), (2, 8.0), (4, 19.0), (8, 15.0))
    steps: tuple[tuple[int, float], ...] = ((30, 91.0), (40, 5.0), (20, 1.5), (25, 1.5), (50, 1.0))
    varied_scales: float = 0.35
    sizes: tuple[tuple[int, float], ...] = ((93_000_000, 1.0),)
    side: int = 1024
    guidance_scale: float = 7.5

    def scaled(self, requests: int, adapters: int) -> Traffic:
        """Return the same traffic with more or fewer requests, its users growing with them."""
        users = max(round(self.users * requests / self.requests), 1)
        return replace(self, requests=requests, adapters=adapters, users=users)


# `day`: the published trace of a production service, its days laid over one another. `blog`: the same sessions as the
# Hugging Face service saw them: 92% of the adapters for SDXL, one image a request, 25 steps.
TRAFFICS = {
    "day": Traffic(),
    "blog": Traffic(bases=(("sdxl", 0.92), ("sd15", 0.08)), images=((1, 1.0),), steps=((25, 1.0),)),
}


def generate(traffic: Traffic, seed: int) -> Workload:
    """Draw a workload; the same parameters and seed give the same one on every machine.

    Raises:
        BenchmarkRefused: the parameters describe no traffic.
    """
    _check(traffic)
    return _Drawing(traffic, random.Random(seed)).workload()


def _check(traffic: Traffic) -> None:
    if traffic.requests < 1 or traffic.adapters < 1 or traffic.days <= 0 or not traffic.bases:
        raise BenchmarkRefused("a workload needs at least one request, one adapter, one base and some days")
    if traffic.keep_base < traffic.keep_set:
        raise BenchmarkRefused(f"keep_base {traffic.keep_base:g} is under keep_set {traffic.keep_set:g}")
    if len(traffic.hours) != 24 or min(traffic.hours) < 0 or not sum(traffic.hours):
        raise BenchmarkRefused("the day has 24 hours, whose weights are not negative and not all zero")


class _Choice:
    """Values drawn by their weights."""

    def __init__(self, pairs: Sequence[tuple[int, float]]) -> None:
        self._values = [value for value, _ in pairs]
        self._upto = list(itertools.accumulate(weight for _, weight in pairs))

    def __call__(self, random_source: random.Random) -> int:
        return self._values[bisect.bisect(self._upto, random_source.random() * self._upto[-1])]


class _Drawing:
    """One workload being drawn. Adapters are numbers by popularity until the end, 0 the most asked for."""

    def __init__(self, traffic: Traffic, random_source: random.Random) -> None:
        self._traffic = traffic
        self._random = random_source
        self._bases = [name for name, _ in traffic.bases]
        self._base_of = self._assign_bases()
        weights = [(rank, (rank + 1) ** -traffic.popularity) for rank in range(traffic.adapters)]
        self._any = _Choice(weights)
        self._of_base = {base: _Choice(own) for base in self._bases if (own := self._own(weights, base))}
        self._several, self._images = _Choice(traffic.several), _Choice(traffic.images)
        self._steps = _Choice(traffic.steps)
        self._favourites: dict[int, list[tuple[int, ...]]] = {}
        self._varied = [random_source.random() < traffic.varied_scales for _ in range(traffic.adapters)]
        self._asks = [AdapterAsk(f"adapter-{rank:05d}") for rank in range(traffic.adapters)]

    def workload(self) -> Workload:
        """Return sessions until there are requests enough, in order of arrival."""
        starts = self._hour_starts()
        arrivals: list[Arrival] = []
        number = 0
        while len(arrivals) < self._traffic.requests:
            start = starts(self._random) * HOUR_S + self._random.random() * HOUR_S
            arrivals += self._session(number, start, self._traffic.requests - len(arrivals))
            number += 1
        arrivals.sort(key=lambda arrival: arrival.at_s)
        size = _Choice(self._traffic.sizes)
        return Workload(tuple(arrivals), {ask.key: size(self._random) for ask in self._asks})

    def _assign_bases(self) -> list[str]:
        """Give each adapter a base, so that the most popular ones spread by the bases' shares too."""
        shares = _Choice([(index, share) for index, (_, share) in enumerate(self._traffic.bases)])
        return [self._bases[shares(self._random)] for _ in range(self._traffic.adapters)]

    def _own(self, weights: list[tuple[int, float]], base: str) -> list[tuple[int, float]]:
        return [(rank, weight) for rank, weight in weights if self._base_of[rank] == base]

    def _hour_starts(self) -> _Choice:
        """Return the hours of all days, by how many sessions begin in each."""
        hours = max(round(self._traffic.days * 24), 1)
        sigma = self._traffic.burst_sigma
        spread = [math.exp(self._random.gauss(0.0, sigma)) for _ in range(hours)]
        return _Choice([(hour, spread[hour] * self._traffic.hours[hour % 24]) for hour in range(hours)])

    def _session(self, number: int, start_s: float, at_most: int) -> list[Arrival]:
        traffic, draw = self._traffic, self._random
        # The square makes some users come often, as they do.
        user = int(traffic.users * draw.random() ** 2)
        length = round(traffic.session_median * math.exp(draw.gauss(0.0, traffic.session_sigma)))
        length = min(max(length, 1), traffic.session_max, at_most)
        end_s = DAY_S if traffic.fold else max(traffic.days * DAY_S, HOUR_S)
        chosen, steps, at_s = self._first(user), self._steps(draw), start_s
        had: list[tuple[int, ...]] = []
        arrivals: list[Arrival] = []
        for turn in range(length):
            if turn:
                at_s += math.exp(draw.gauss(traffic.gap_log_mean, traffic.gap_log_sd))
                chosen = chosen if draw.random() < traffic.keep_set else self._change(chosen, had)
            if chosen not in had:
                had.append(chosen)
            asks = tuple(self._ask(rank) for rank in chosen)
            base = self._base_of[chosen[0]]
            is_bare = traffic.adapterless > 0 and draw.random() < traffic.adapterless
            arrivals.append(
                Arrival(
                    at_s % end_s, base, () if is_bare else asks, steps, self._images(draw),
                    traffic.side, traffic.side, traffic.guidance_scale, user, number,
                )
            )  # fmt: skip
        self._favourites[user] = [*self._favourites.get(user, ()), *had][-12:]
        return arrivals

    def _first(self, user: int) -> tuple[int, ...]:
        favourites = self._favourites.get(user)
        if favourites and self._random.random() < self._traffic.known:
            return self._random.choice(favourites)
        return self._fresh(self._any)

    def _change(self, chosen: tuple[int, ...], had: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Return another set: one that the session has had, or a new one, mostly of the same base."""
        draw, traffic = self._random, self._traffic
        others = [one for one in had if one != chosen]
        if others and draw.random() < traffic.again:
            return draw.choice(others)
        stays = draw.random() < (traffic.keep_base - traffic.keep_set) / max(1 - traffic.keep_set, 1e-9)
        return self._fresh(self._of_base[self._base_of[chosen[0]]] if stays else self._any)

    def _fresh(self, popularity: _Choice) -> tuple[int, ...]:
        """Return a set of adapters for one base, in order of rank."""
        first = popularity(self._random)
        count = self._several(self._random)
        chosen = {first}
        own = self._of_base[self._base_of[first]]
        for _ in range(4 * count):
            if len(chosen) == count:
                break
            chosen.add(own(self._random))
        return tuple(sorted(chosen))

    def _ask(self, rank: int) -> AdapterAsk:
        if not self._varied[rank] or self._random.random() < 0.7:
            return self._asks[rank]
        return AdapterAsk(self._asks[rank].key, self._random.choice((0.4, 0.6, 0.7, 0.8, 0.9)))


def named_traffic(name: str, *, requests: int | None = None, adapters: int | None = None) -> Traffic:
    """Return a traffic by name, with as many requests and adapters as asked for.

    Raises:
        BenchmarkRefused: there is no such traffic.
    """
    if name not in TRAFFICS:
        raise BenchmarkRefused(f"there is no traffic '{name}'; there are {', '.join(TRAFFICS)}")
    traffic = TRAFFICS[name]
    return traffic.scaled(requests or traffic.requests, adapters or traffic.adapters)

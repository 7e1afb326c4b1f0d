"""What a replica notes about its own requests, so that routers can predict how the next one would fare.

Owns the numbers behind `record_routing_stats`: what is on its way here, what will be in the weights, what fetches and
swaps really took, and whether the device makes headway. Must not know Ray, torch, the store or the worker: it is told.
Runs on one event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from serve_app.core import AdapterSpec, Timings
from serve_app.routing.cost import LinearCost, RequestLoad, RequiredAdapter, TierCosts
from serve_app.routing.stats import HEARTBEAT_S, MAX_REPORTED, MeasuredCosts, ReplicaStats, encode, tag_of
from serve_app.work import LatencyModel

NEWEST_WEIGHT = 0.2
# One measurement moves a cost no further than this many times from its default, either way.
MAX_FACTOR = 50.0
# A shorter swap is none: the adapters were in the weights already.
MIN_SWAP_MS = 0.3


class LeasedAdapter(Protocol):
    """An adapter that a request was given, and on which tier it was found: a `Lease` of the store."""

    @property
    def spec(self) -> AdapterSpec:
        """Which one."""
        ...

    @property
    def tier(self) -> str:
        """Where it was."""
        ...

    @property
    def fetch_ms(self) -> float:
        """How long the request waited for it."""
        ...


@dataclass(frozen=True, slots=True)
class DeviceLoad:
    """What the device thread says of itself.

    `backlog_s` is the predicted time of all that runs, waits or still fetches its adapters. `progress` is any number
    that changes while it makes headway, `is_busy` whether it has something to do. One that `has_failed` answers
    nothing more, and is to be replaced.
    """

    backlog_s: float
    pace: LatencyModel
    progress: float
    is_busy: bool
    has_failed: bool = False


@dataclass(frozen=True, slots=True)
class Tiers:
    """Which adapters are on which tier, least recently used first, and what the host tier takes before it evicts."""

    host: Sequence[str]
    host_free_bytes: float
    device: Sequence[str] = ()


class _Factor:
    """How many times its default a step takes here, smoothed."""

    def __init__(self, step: LinearCost) -> None:
        self._step = step
        self.value = 1.0
        self._has_observed = False

    def observe(self, seconds: float, size_bytes: int) -> None:
        expected = self._step.seconds(size_bytes)
        if expected <= 0 or seconds < 0:
            return
        factor = min(max(seconds / expected, 1 / MAX_FACTOR), MAX_FACTOR)
        weight = NEWEST_WEIGHT if self._has_observed else 1.0
        self._has_observed = True
        self.value = (1 - weight) * self.value + weight * factor


class RoutingStatsCollector:
    """One replica's notes for the routers."""

    def __init__(
        self,
        *,
        wall_clock: Callable[[], float],
        clock: Callable[[], float],
        stall_after_s: float = 60.0,
        costs: TierCosts | None = None,
    ) -> None:
        """Start with nothing known.

        Args:
            wall_clock: Unix seconds, which routers compare with their own.
            clock: Seconds that only grow.
            stall_after_s: How long a busy device may show no headway.
            costs: What routers take steps to cost; measurements are told in relation to them.
        """
        self._wall_clock = wall_clock
        self._clock = clock
        self._stall_after_s = stall_after_s
        costs = costs or TierCosts()
        self._swap, self._to_host, self._fetch = _Factor(costs.swap), _Factor(costs.to_host), _Factor(costs.fetch)
        self._arriving: Counter[str] = Counter()
        self._last: tuple[RequiredAdapter, ...] = ()
        self._progress: tuple[float, float] = (0.0, clock())
        self._told: dict[str, Any] = {}

    @contextmanager
    def fetching(self, demand: RequestLoad) -> Generator[None]:
        """Note that a request's adapters are on their way here, those that are not here yet."""
        self._arriving.update(need.key for need in demand.adapters)
        try:
            yield
        finally:
            self._arriving.subtract(need.key for need in demand.adapters)
            self._arriving = +self._arriving

    def queued(self, demand: RequestLoad) -> None:
        """Note a request that now waits for the device: its adapters will be in the weights after all others'."""
        self._last = demand.adapters

    def served(self, found: Iterable[LeasedAdapter], timings: Timings) -> None:
        """Take in what bringing and applying a request's adapters took; `found` are its leases."""
        size_bytes = 0
        for lease in found:
            size_bytes += lease.spec.size_bytes
            if lease.tier != "host":
                step = self._fetch if lease.tier == "remote" else self._to_host
                step.observe(lease.fetch_ms / 1000, lease.spec.size_bytes)
        if size_bytes and timings.swap_ms >= MIN_SWAP_MS:
            self._swap.observe(timings.swap_ms / 1000, size_bytes)

    def snapshot(self, load: DeviceLoad, tiers: Tiers) -> dict[str, Any]:
        """Return what routers are to know, the same object as long as there is no news."""
        now_s = self._wall_clock()
        resident = set(tiers.host)
        stats = ReplicaStats(
            at_s=now_s,
            backlog_s=load.backlog_s,
            pace=load.pace,
            applied=frozenset(tag_of(need.key) for need in self._last),
            device=_told(tiers.device),
            host=_told(tiers.host),
            arriving=frozenset(tag_of(key) for key in self._arriving if key not in resident),
            host_free_bytes=tiers.host_free_bytes,
            measured=MeasuredCosts(self._swap.value, self._to_host.value, self._fetch.value),
            is_stalled=self._update_stall_state(load),
        )
        news = {**encode(stats), "beat": int(now_s // HEARTBEAT_S)}
        if any(self._told.get(name) != value for name, value in news.items()):
            # The time of the last change, not of the last telling: that alone would be news at every asking.
            self._told = {**news, "at": now_s}
        return self._told

    def _update_stall_state(self, load: DeviceLoad) -> bool:
        if load.has_failed:
            return True
        progress, since_s = self._progress
        if not load.is_busy or load.progress != progress:
            self._progress = (load.progress, self._clock())
            return False
        return self._clock() - since_s > self._stall_after_s


def _told(keys: Sequence[str]) -> frozenset[str]:
    latest: Iterable[str] = islice(reversed(keys), MAX_REPORTED)
    return frozenset(map(tag_of, latest))

"""A service in simulated time: discrete events through production's own ranking, queue, eviction and scaling.

Owns the clock, and the life of each request from its arrival to its answer. Must not decide where a request goes, what
runs next or what is evicted: it calls those who do.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from serve_app.autoscaling.desired import ScalingRule
from serve_app.bench.simulation.device import Counts
from serve_app.bench.simulation.job import Job, Jobs, Setting
from serve_app.bench.simulation.pool import Pool
from serve_app.bench.simulation.profile import Profile
from serve_app.bench.simulation.replica import Replica
from serve_app.bench.simulation.routers import SHOWN_IN_FULL, Policy
from serve_app.bench.simulation.scale import Scaler
from serve_app.bench.traffic.workload import Workload
from serve_app.routing.cost import waits_s
from serve_app.routing.spread import spread_images

# As `deployments.ingress` does it: so long after a replica has joined, the others give back once more.
LEVEL_AGAIN_S = 3.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many replicas a base has: `replicas` of them, or, with a rule, what the rule wants, beginning with those.

    From none, the first request starts `from_zero`. Each takes on `max_ongoing` requests at a time.
    """

    replicas: int
    scaling: ScalingRule | None = None
    downscale_delay_s: float = 300.0
    from_zero: int = 1
    max_ongoing: int = 16

    @property
    def most(self) -> int:
        """How many there can be."""
        return self.scaling.max_replicas if self.scaling is not None else self.replicas


@dataclass(frozen=True, slots=True)
class Run:
    """The results of one base's requests; `latencies_s`, `images` and `alone_s` in order of arrival.

    `alone_s` is what each would take on an idle replica that holds its adapters. `replica_s` is the time that all
    replicas were paid for, from the first arrival to the last answer; `most` is how many there were at once.
    """

    base_id: str
    latencies_s: array[float]
    fetches: int
    disk_reads: int
    swaps: int
    passes: int
    busy_s: float
    replica_s: float
    most: int
    images: array[int]
    alone_s: array[float]


def simulate(
    workload: Workload, profile: Profile, policy: Policy, fleet: Fleet, *, seed: int, noise: float = 0.0
) -> Run:
    """Play the requests of one base; the same arguments give the same run."""
    base_id = workload.arrivals[0].base_id
    setting = Setting(
        profile,
        profile.base(base_id),
        noise=noise,
        is_fetching_early=policy.is_fetching_early,
        swap_s=profile.blog_swap_s if policy.has_blog_swap else None,
        max_ongoing=fleet.max_ongoing,
    )
    return _Simulation(workload, setting, policy, fleet, random.Random(seed)).run()


class _Simulation:
    """One run. Invariants: time never goes back; every request is answered once."""

    def __init__(self, workload: Workload, setting: Setting, policy: Policy, fleet: Fleet, rng: random.Random) -> None:
        self._arrivals = workload.arrivals
        self._jobs = Jobs(workload, setting)
        profile = setting.profile
        self._pool = Pool(
            fleet.most,
            per_node=profile.replicas_per_node,
            host_bytes=profile.host_cache_bytes,
            disk_bytes=profile.disk_cache_bytes,
        )
        self._counts = Counts()
        self._events: list[tuple[float, int, Callable[..., None], object]] = []
        self._number = 0
        self._now_s = 0.0
        self._parked: deque[Job] = deque()
        self._latencies_s = array("d", [-1.0]) * len(self._arrivals)
        self._alone_s = array("d", [0.0]) * len(self._arrivals)
        self._parts = array("i", [0]) * len(self._arrivals)
        self._left = len(self._arrivals)
        self._pace = setting.timings.pace
        self._is_spread = policy.is_spread
        self._route = policy.router(self._pool, setting, rng)
        self._replicas = [
            Replica(
                index, self._pool, setting, self._schedule, self._done, rng, self._counts, has_steps=policy.has_steps
            )
            for index in range(fleet.most)
        ]
        start_s = setting.timings.start_s
        self._scaler = Scaler(
            self._pool, fleet.replicas, fleet.scaling, start_s, fleet.downscale_delay_s, fleet.from_zero
        )
        self._is_scaling = fleet.scaling is not None

    def run(self) -> Run:
        """Play everything and return what it came to."""
        if self._is_scaling:
            self._schedule(0.0, self._tick, None)
        for number, arrival in enumerate(self._arrivals):
            self._play_until(arrival.at_s)
            self._arrive(self._jobs.job(number, arrival))
        while self._left and self._events:
            self._next()
        if self._left:
            raise RuntimeError(f"{self._left} requests were never answered")
        counts = self._counts
        return Run(
            self._arrivals[0].base_id, self._latencies_s, counts.fetches, counts.disk_reads, counts.swaps,
            counts.passes, counts.busy_s, self._scaler.paid_s(self._now_s), self._scaler.most,
            array("i", [arrival.images for arrival in self._arrivals]), self._alone_s,
        )  # fmt: skip

    def _schedule(self, at_s: float, act: Callable[..., None], what: object) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, act, what))

    def _play_until(self, at_s: float) -> None:
        while self._events and self._events[0][0] <= at_s:
            self._next()
        self._now_s = max(self._now_s, at_s)

    def _next(self) -> None:
        at_s, _, act, what = heapq.heappop(self._events)
        if at_s < self._now_s:
            raise RuntimeError(f"an event at {at_s} s came after {self._now_s} s")
        self._now_s = at_s
        act(what, at_s)

    def _arrive(self, job: Job) -> None:
        self._scaler.arrived(job.predicted_s, self._now_s)
        self._alone_s[job.number] = job.predicted_s
        parts = self._split(job)
        self._parts[job.number] = len(parts)
        for part in parts:
            if self._parked or not self._place(part):
                self._parked.append(part)

    def _split(self, job: Job) -> list[Job]:
        """Return the parts of a request that go their own ways."""
        if not self._is_spread or job.images == 1:
            return [job]
        replicas = np.flatnonzero(self._pool.is_open)
        if len(replicas) > SHOWN_IN_FULL:
            replicas = replicas[np.argsort(self._pool.backlog_s(self._now_s)[replicas])[:SHOWN_IN_FULL]]
        views = [self._pool.view(int(index), self._now_s, self._pace) for index in replicas]
        counts = spread_images(job.images, job.demand, [(waits_s(job.demand, view), view.pace) for view in views])
        return [self._jobs.part(job, count) for count in counts] if len(counts) > 1 else [job]

    def _place(self, job: Job) -> bool:
        index = self._route(job, self._now_s)
        if index is None:
            return False
        self._replicas[index].accept(job, self._now_s)
        return True

    def _done(self, replica: Replica, jobs: Sequence[Job], now_s: float) -> None:
        for job in jobs:
            if self._latencies_s[job.number] >= 0:
                raise RuntimeError(f"request {job.number} was answered twice")
            self._parts[job.number] -= 1
            if not self._parts[job.number]:
                self._latencies_s[job.number] = now_s - job.at_s
                self._left -= 1
        self._place_parked()
        if replica.is_idle:
            self._scaler.idled(replica.index, now_s)

    def _place_parked(self) -> None:
        while self._parked and self._place(self._parked[0]):
            self._parked.popleft()

    def _tick(self, what: object, now_s: float) -> None:
        parked_s = sum(job.predicted_s for job in self._parked)
        for there_s in self._scaler.decide(now_s, parked_s=parked_s, parked=len(self._parked)):
            self._schedule(there_s, self._started, None)
        if self._left:
            self._schedule(now_s + self._scaler.period_s, self._tick, None)

    def _started(self, what: object, now_s: float) -> None:
        self._scaler.started(now_s)
        self._place_parked()
        self._level(None, now_s)
        self._schedule(now_s + LEVEL_AGAIN_S, self._level, None)

    def _level(self, what: object, now_s: float) -> None:
        replicas = [self._replicas[index] for index in np.flatnonzero(self._pool.is_open)]
        mean_s = float(self._pool.backlog_s(now_s)[self._pool.is_open].mean())
        given = [job for replica in replicas for job in replica.give_back(mean_s, now_s)]
        for job in sorted(given, key=lambda job: job.ticket):
            if not self._place(job):
                self._parked.append(job)

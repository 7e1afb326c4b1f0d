"""Which replica a request goes to: production's own ranking, and the policies that it is compared with.

Owns the policies. `loraplex` calls `serve_app.routing.cost.rank`; over many replicas it is shown one replica of each
kind, found in tables, since those of a kind differ by their work alone and the ranking prefers the least.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.bench.simulation.job import Job, Setting
from serve_app.bench.simulation.pool import ARRIVING, ON_HOST, Pool
from serve_app.routing.cost import TIE_S, rank

# Up to so many replicas the ranking sees all of them.
SHOWN_IN_FULL = 64
RING_POINTS = 64
BOUNDED_LOAD = 1.25

# Returns a replica's index, or None where every one is full.
Router = Callable[[Job, float], "int | None"]


@dataclass(frozen=True, slots=True)
class Policy:
    """A way to place requests, and what goes with it: when adapters are fetched, and how they are changed.

    With `has_steps` passes take turns between their steps, with `is_spread` a request's images go to several replicas.
    """

    name: str
    about: str
    router: type[LoraplexRouter | LeastWork | RandomTwo | LeastLoaded | RayMultiplexed | Affinity | ConsistentHash]
    is_fetching_early: bool = True
    has_blog_swap: bool = False
    has_steps: bool = False
    is_spread: bool = False


class _Over:
    """The parts of all routers: the tables, which replicas take requests, and chance."""

    def __init__(self, pool: Pool, setting: Setting, rng: random.Random) -> None:
        self._pool = pool
        self._setting = setting
        self._rng = rng

    def _takers(self) -> NDArray[np.intp]:
        pool = self._pool
        return np.flatnonzero(pool.is_open & (pool.ongoing < self._setting.max_ongoing))

    def _least(self, candidates: NDArray[np.intp]) -> int | None:
        """Return one of those with the fewest requests, by chance where they are several."""
        if not len(candidates):
            return None
        ongoing = self._pool.ongoing[candidates]
        ties = candidates[ongoing == ongoing.min()]
        return int(ties[self._rng.randrange(len(ties))])

    def _holders(self, job: Job, candidates: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return those that hold, or are fetching, the first adapter: Ray knows one id a request."""
        if not job.demand.adapters:
            return candidates[:0]
        return candidates[(self._pool.row(job.demand.adapters[0].key)[candidates] & (ARRIVING | ON_HOST)) != 0]


class LoraplexRouter(_Over):
    """Production's ranking: by work, and by what is missing."""

    def __call__(self, job: Job, now_s: float) -> int | None:
        """Return the best of those that take requests."""
        takers = self._takers()
        if not len(takers):
            return None
        if len(takers) > SHOWN_IN_FULL:
            takers = self.representatives(job, takers, now_s)
        pace = self._setting.timings.pace
        views = [self._pool.view(int(index), now_s, pace) for index in takers]
        return int(rank(job.demand, views, rng=self._rng)[0])

    def representatives(self, job: Job, takers: NDArray[np.intp], now_s: float) -> NDArray[np.intp]:
        """Return one replica of each kind: the least work ahead among those with the same adapters.

        A cost grows with the work ahead, and depends beyond that on which adapters are missing and on whether the
        weights hold the composition: so the best of all is among these.
        """
        pool = self._pool
        kinds = (pool.last[takers] == job.demand.composition).astype(np.int64)
        for need in job.demand.adapters:
            kinds = kinds * 2 + ((pool.row(need.key)[takers] & (ARRIVING | ON_HOST)) != 0)
        backlog_s = pool.backlog_s(now_s)[takers]
        return np.array([takers[self._least_of(backlog_s, kinds == kind)] for kind in np.unique(kinds)], dtype=np.intp)

    def _least_of(self, backlog_s: NDArray[np.float64], is_one: NDArray[np.bool_]) -> int:
        """Return the place of the least backlog, by chance where several have it."""
        places = np.flatnonzero(is_one)
        own = backlog_s[places]
        ties = np.flatnonzero(own == own.min())
        return int(places[ties[self._rng.randrange(len(ties))]])


class LeastLoaded(_Over):
    """The fewest requests, regardless of what they need."""

    def __call__(self, job: Job, now_s: float) -> int | None:
        """Return one of those with the fewest requests."""
        return self._least(self._takers())


class RandomTwo(_Over):
    """Two by chance, and the shorter queue: Ray Serve's default without model ids."""

    def __call__(self, job: Job, now_s: float) -> int | None:
        """Return one of two that take requests."""
        takers = self._takers()
        drawn = self._rng.sample(range(len(takers)), min(len(takers), 2))
        return self._least(takers[np.array(drawn, dtype=np.intp)])


class LeastWork(_Over):
    """The least predicted work ahead, regardless of where adapters are."""

    def __call__(self, job: Job, now_s: float) -> int | None:
        """Return one of those with the least work."""
        takers = self._takers()
        if not len(takers):
            return None
        ahead_s = self._pool.backlog_s(now_s)[takers]
        ties = takers[ahead_s <= ahead_s.min() + TIE_S]
        return int(ties[self._rng.randrange(len(ties))])


class RayMultiplexed(_Over):
    """Ray Serve's default with a multiplexed model id: two by chance among the holders, and the shorter queue.

    Where both are full, or none holds it, two among those with the fewest models, at last two among all, again and
    again until one has room. Ray's pauses between attempts are left out, in its favour.
    """

    def __call__(self, job: Job, now_s: float) -> int | None:
        """Return the replica of the first attempt that finds room."""
        pool = self._pool
        everyone = np.flatnonzero(pool.is_open)
        if not len(everyone):
            return None
        held = self._holders(job, everyone)
        fewest = everyone[pool.models[everyone] == pool.models[everyone].min()]
        for candidates in (held, fewest, self._takers()) if job.demand.adapters else (self._takers(),):
            found = self._of_two(candidates)
            if found is not None:
                return found
        return None

    def _of_two(self, candidates: NDArray[np.intp]) -> int | None:
        count = min(len(candidates), 2)
        drawn = np.array(self._rng.sample(range(len(candidates)), count), dtype=np.intp)
        chosen = candidates[drawn]
        return self._least(chosen[self._pool.ongoing[chosen] < self._setting.max_ongoing])


class Affinity(_Over):
    """Anyone who holds the adapter, however long the queue there; else the fewest requests."""

    def __call__(self, job: Job, now_s: float) -> int | None:
        """Return a holder, or the least loaded."""
        everyone = np.flatnonzero(self._pool.is_open)
        held = self._holders(job, everyone)
        return self._least(held if len(held) else everyone)


class ConsistentHash(_Over):
    """The next replica on a ring that has at most 1.25 times the mean number of requests."""

    def __init__(self, pool: Pool, setting: Setting, rng: random.Random) -> None:
        super().__init__(pool, setting, rng)
        points = [(_hash(f"{index}/{point}"), index) for index in range(pool.size) for point in range(RING_POINTS)]
        self._ring = sorted(points)

    def __call__(self, job: Job, now_s: float) -> int | None:
        """Return the first on the ring with room."""
        pool = self._pool
        num_open = int(pool.is_open.sum())
        if not num_open:
            return None
        bound = math.ceil(BOUNDED_LOAD * (int(pool.ongoing[pool.is_open].sum()) + 1) / num_open)
        name = job.demand.adapters[0].key if job.demand.adapters else f"base-{job.number}"
        start = bisect.bisect(self._ring, (_hash(name), 0))
        for step in range(len(self._ring)):
            index = self._ring[(start + step) % len(self._ring)][1]
            if pool.is_open[index] and pool.ongoing[index] < bound:
                return index
        return self._least(np.flatnonzero(pool.is_open))


POLICIES = (
    Policy(
        "loraplex",
        "the service's own: least work, missing adapters counted as work; passes take turns, images are spread",
        LoraplexRouter,
        has_steps=True,
        is_spread=True,
    ),
    Policy("loraplex-whole", "the same with step_sharing: false", LoraplexRouter),
    Policy("loraplex-unspread", "as loraplex, each request on one replica", LoraplexRouter, has_steps=True),
    Policy("least-work", "least predicted work, adapters ignored", LeastWork),
    Policy("random-two", "two by chance, the shorter queue", RandomTwo),
    Policy("least-loaded", "fewest requests, adapters fetched at admission", LeastLoaded),
    Policy("least-loaded-late", "fewest requests, adapters fetched at their turn", LeastLoaded, False),
    Policy("ray-multiplexed", "Ray Serve's default for multiplexed models", RayMultiplexed),
    Policy("consistent-hash", "a ring with bounded load, 1.25", ConsistentHash),
    Policy("affinity", "anyone who holds the adapter, without a bound", Affinity),
    Policy("blog", "fewest requests, the blog's swap, adapters fetched at their turn", LeastLoaded, False, True),
)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

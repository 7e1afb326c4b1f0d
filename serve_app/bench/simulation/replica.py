"""One replica in the simulator: it fetches, and has its device draw, as production's does, in simulated time.

Owns what a replica holds and waits for. The store's own budget decides what leaves host memory; this file only lets
time pass.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from serve_app.bench.simulation.device import Counts, Schedule, SharedSteps, Surroundings, WholePasses
from serve_app.bench.simulation.job import Job, Setting
from serve_app.bench.simulation.pool import Pool
from serve_app.routing.cost import RequiredAdapter
from serve_app.store.budget import ByteBudget


class Replica:
    """One replica. Invariant: an accepted job is pinned in host memory until its pass has ended."""

    def __init__(
        self,
        index: int,
        pool: Pool,
        setting: Setting,
        schedule: Schedule,
        on_done: Callable[[Replica, Sequence[Job], float], None],
        rng: random.Random,
        counts: Counts,
        *,
        has_steps: bool,
    ) -> None:
        self.index = index
        self._pool, self._setting, self._schedule = pool, setting, schedule
        self._on_done, self._rng, self._counts = on_done, rng, counts
        self._node = index // pool.per_node
        self._budget = ByteBudget(setting.profile.host_cache_bytes)
        self._jobs: dict[int, Job] = {}
        self._wanting: dict[str, list[Job]] = {}
        self._coming_s = 0.0
        around = Surroundings(
            setting, counts, schedule, self._ended, self._late_fetch_s, self._set_backlog, self._chance
        )
        self._device = SharedSteps(around) if has_steps else WholePasses(around)

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do."""
        return not self._jobs

    def accept(self, job: Job, now_s: float) -> None:
        """Take on a job: fetch what it needs now, or leave that to its turn."""
        pool = self._pool
        self._jobs[job.ticket] = job
        self._coming_s += job.predicted_s
        pool.ongoing[self.index] += 1
        pool.queued_s[self.index] += job.predicted_s
        pool.last[self.index] = job.demand.composition
        for need in job.demand.adapters:
            self._budget.pin(need.key)
        if self._setting.is_fetching_early:
            for need in job.demand.adapters:
                self._want(job, need, now_s)
        if not job.missing:
            self._enqueue(job, now_s)

    def give_back(self, keep_s: float, now_s: float) -> list[Job]:
        """Let go of what has not begun, the last first, until no more than `keep_s` of work is left; return it."""
        given = self._device.give_back(keep_s, now_s)
        self._let_go(given)
        self._pool.queued_s[self.index] -= sum(job.predicted_s for job in given)
        return given

    def _want(self, job: Job, need: RequiredAdapter, now_s: float) -> None:
        if need.key in self._budget:
            return
        job.missing += 1
        wanting = self._wanting.setdefault(need.key, [])
        wanting.append(job)
        if len(wanting) == 1:
            there_s = now_s + self._way_s(need, now_s)
            self._pool.set_arriving(self.index, need.key, there_s)
            self._schedule(there_s, self._arrived, need)

    def _way_s(self, need: RequiredAdapter, now_s: float) -> float:
        """Return how long an adapter takes to host memory: from the node's disk, or from its source."""
        pool, costs, node = self._pool, self._setting.profile.costs, self._node
        read_s = costs.to_host.seconds(need.size_bytes)
        if need.key in pool.disk[node]:
            self._counts.disk_reads += 1
            pool.disk_budgets[node].pin(need.key)
            pool.disk_budgets[node].unpin(need.key)
            return read_s
        under_way = pool.disk_arriving[node].get(need.key)
        if under_way is not None and under_way >= now_s and pool.disk_budgets[node].budget_bytes:
            self._counts.disk_reads += 1
            return under_way - now_s + read_s
        self._counts.fetches += 1
        fetch_s = costs.fetch.seconds(need.size_bytes) * self._chance()
        pool.disk_arriving[node][need.key] = now_s + fetch_s
        self._schedule(now_s + fetch_s, self._on_disk, need)
        return fetch_s

    def _on_disk(self, need: RequiredAdapter, now_s: float) -> None:
        self._pool.to_disk(self._node, need.key, need.size_bytes)

    def _arrived(self, need: RequiredAdapter, now_s: float) -> None:
        self._hold(need)
        for job in self._wanting.pop(need.key, ()):
            job.missing -= 1
            if not job.missing:
                self._enqueue(job, now_s)

    def _hold(self, need: RequiredAdapter) -> None:
        plan = self._budget.add(need.key, need.size_bytes)
        self._pool.host_changed(self.index, need.key, plan.evict)

    def _enqueue(self, job: Job, now_s: float) -> None:
        self._coming_s -= job.predicted_s
        self._device.enqueue(job, now_s)

    def _set_backlog(self, others_s: float, end_s: float) -> None:
        self._pool.queued_s[self.index] = others_s + max(self._coming_s, 0.0)
        self._pool.end_s[self.index] = end_s

    def _late_fetch_s(self, job: Job, now_s: float) -> float:
        """Fetch on the device's own time, where nothing was fetched at admission."""
        late_s = 0.0
        if not self._setting.is_fetching_early:
            for need in job.demand.adapters:
                if need.key not in self._budget:
                    late_s = max(late_s, self._way_s(need, now_s))
                    self._hold(need)
        return late_s

    def _ended(self, jobs: Sequence[Job], now_s: float) -> None:
        self._let_go(jobs)
        if not self._jobs:
            # Sums of differences drift; with nothing accepted the truth is known.
            self._coming_s = self._pool.queued_s[self.index] = 0.0
        self._on_done(self, jobs, now_s)

    def _let_go(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            del self._jobs[job.ticket]
            self._pool.ongoing[self.index] -= 1
            for need in job.demand.adapters:
                plan = self._budget.unpin(need.key)
                if plan.evict:
                    self._pool.host_changed(self.index, None, plan.evict)

    def _chance(self) -> float:
        """Return a factor around one, for what no prediction knows."""
        noise = self._setting.noise
        return math.exp(self._rng.gauss(-noise * noise / 2, noise)) if noise else 1.0

"""One replica in the simulator: it fetches, queues, swaps and draws as production's does, in simulated time.

Owns a replica's course. The next pass is chosen by the engine's own queue, and what leaves host memory by the store's
own budget; this file only lets time pass between them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from serve_app.bench.simulation.job import Job, Setting
from serve_app.bench.simulation.pool import Pool
from serve_app.engine.worker.scheduling import AdapterSetKey, QueuedRequest, next_batch, remaining_after
from serve_app.routing.cost import RequiredAdapter
from serve_app.store.budget import ByteBudget

# Called with a time, a function and its argument: the function is to run then.
Schedule = Callable[[float, Callable[..., None], object], None]


class Counts:
    """What all replicas of a run did."""

    def __init__(self) -> None:
        self.fetches = 0
        self.disk_reads = 0
        self.swaps = 0
        self.passes = 0
        self.busy_s = 0.0


class Replica:
    """One replica. Invariant: an accepted job is pinned in host memory until its pass has ended."""

    def __init__(
        self,
        index: int,
        pool: Pool,
        setting: Setting,
        schedule: Schedule,
        on_done: Callable[[Replica, list[Job], float], None],
        rng: random.Random,
        counts: Counts,
    ) -> None:
        self.index = index
        self._pool, self._setting, self._schedule = pool, setting, schedule
        self._on_done, self._rng, self._counts = on_done, rng, counts
        self._node = index // pool.per_node
        self._budget = ByteBudget(setting.profile.host_cache_bytes)
        self._jobs: dict[int, Job] = {}
        self._waiting: list[QueuedRequest] = []
        self._wanting: dict[str, list[Job]] = {}
        self._applied: AdapterSetKey = ()
        self._is_running = False

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do."""
        return not self._jobs

    def accept(self, job: Job, now_s: float) -> None:
        """Take on a job: fetch what it needs now, or leave that to its turn."""
        pool = self._pool
        self._jobs[job.number] = job
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
        self._waiting.append(QueuedRequest(job.number, job.key, job.images, arrived_s=job.at_s, units=job.demand.units))
        if not self._is_running:
            self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        """Begin the next pass, if anything waits."""
        setting, pool = self._setting, self._pool
        batch = next_batch(
            self._waiting,
            applied=self._applied,
            now_s=now_s,
            policy=setting.queue,
            max_images=setting.profile.max_batch_images,
        )
        if batch is None:
            return
        self._waiting = remaining_after(self._waiting, batch, now_s=now_s, policy=setting.queue)
        jobs = [self._jobs[job_id] for job_id in batch.tickets]
        took_s = self._late_fetch_s(jobs, now_s) + self._swap_s(batch.key.composition, jobs[0])
        took_s += setting.timings.pace.seconds(sum(job.demand.units for job in jobs)) * self._chance()
        for job in jobs:
            job.began_s = now_s
            pool.queued_s[self.index] -= job.predicted_s
        if len(self._jobs) == len(jobs):
            # Sums of differences drift; with nothing else accepted the truth is known.
            pool.queued_s[self.index] = 0.0
        self._is_running = True
        pool.end_s[self.index] = now_s + took_s
        self._counts.passes += 1
        self._counts.busy_s += took_s
        self._schedule(now_s + took_s, self._ended, jobs)

    def _late_fetch_s(self, jobs: list[Job], now_s: float) -> float:
        """Fetch on the device's own time, where nothing was fetched at admission."""
        late_s = 0.0
        if not self._setting.is_fetching_early:
            for need in jobs[0].demand.adapters:
                if need.key not in self._budget:
                    late_s = max(late_s, self._way_s(need, now_s))
                    self._hold(need)
        return late_s

    def _swap_s(self, composition: AdapterSetKey, job: Job) -> float:
        if composition == self._applied:
            return 0.0
        self._applied = composition
        self._counts.swaps += 1
        if self._setting.swap_s is not None:
            return self._setting.swap_s
        costs = self._setting.profile.costs
        sizes = [need.size_bytes for need in job.demand.adapters]
        return costs.swap.seconds(sum(sizes)) + sum(costs.to_device.seconds(size) for size in sizes)

    def _ended(self, jobs: list[Job], now_s: float) -> None:
        self._is_running = False
        for job in jobs:
            job.done_s = now_s
            del self._jobs[job.number]
            self._pool.ongoing[self.index] -= 1
            for need in job.demand.adapters:
                plan = self._budget.unpin(need.key)
                if plan.evict:
                    self._pool.host_changed(self.index, None, plan.evict)
        self._begin(now_s)
        self._on_done(self, jobs, now_s)

    def _chance(self) -> float:
        """Return a factor around one, for what no prediction knows."""
        noise = self._setting.noise
        return math.exp(self._rng.gauss(-noise * noise / 2, noise)) if noise else 1.0

"""How many replicas the simulated service has, by production's own rule.

Owns the life of replicas: asked for, starting, open, draining, gone. How many there should be is
`serve_app.autoscaling.desired.desired_replicas`'s to say.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from serve_app.autoscaling.desired import Load, ScalingRule, desired_replicas
from serve_app.bench.simulation.pool import Pool

PERIOD_S = 1.0
# Over how long the arriving work is averaged.
ARRIVING_WINDOW_S = 60.0


class Scaler:
    """The replicas of one run over time; without a rule their number stays what it was at the start.

    Going down waits until the rule has wanted fewer for `down_delay_s` without a break, as Ray Serve does.
    """

    def __init__(
        self,
        pool: Pool,
        replicas: int,
        rule: ScalingRule | None,
        start_s: float,
        down_delay_s: float,
        from_zero: int = 1,
    ) -> None:
        self.period_s = PERIOD_S
        self.most = replicas
        self._pool, self._rule, self._start_s, self._down_delay_s = pool, rule, start_s, down_delay_s
        self._from_zero = from_zero
        pool.is_open[:replicas] = True
        self._starting = 0
        self._draining: set[int] = set()
        self._fewer_since_s: float | None = None
        self._paid_s = 0.0
        self._paid_until_s = 0.0
        self._arrived: deque[tuple[float, float]] = deque()
        self._arrived_s = 0.0

    def arrived(self, work_s: float, now_s: float) -> None:
        """Count a request's work."""
        if self._rule is not None:
            self._arrived.append((now_s, work_s))
            self._arrived_s += work_s

    def decide(self, now_s: float, *, parked_s: float, parked: int) -> list[float]:
        """Ask the rule; return when each replica that it asks for will be there."""
        if self._rule is None:
            return []
        self._pay(now_s)
        while self._arrived and self._arrived[0][0] < now_s - ARRIVING_WINDOW_S:
            self._arrived_s -= self._arrived.popleft()[1]
        running = int(self._pool.is_open.sum())
        load = Load(
            running=running,
            starting=self._starting,
            work_s=float(self._pool.backlog_s(now_s).sum()) + parked_s,
            requests=float(self._pool.ongoing.sum()) + parked,
            arriving=self._arrived_s / ARRIVING_WINDOW_S if self._arrived else 0.0,
        )
        wanted = desired_replicas(load, self._rule).replicas
        if not running and load.requests:
            # With no replica running, Serve does not ask the policy and starts so many.
            wanted = max(self._from_zero, self._starting)
        return self._follow(wanted - running - self._starting, now_s)

    def _follow(self, change: int, now_s: float) -> list[float]:
        if change >= 0:
            self._fewer_since_s = None
            free = self._pool.size - int(self._pool.is_open.sum()) - len(self._draining) - self._starting
            asked = min(change, free)
            self._starting += asked
            self.most = max(self.most, self._present())
            return [now_s + self._start_s] * asked
        if self._fewer_since_s is None:
            self._fewer_since_s = now_s
        if now_s - self._fewer_since_s >= self._down_delay_s:
            self._close(-change)
        return []

    def _close(self, count: int) -> None:
        """Close those with the least to do; each goes once it has answered everything."""
        pool = self._pool
        is_open = np.flatnonzero(pool.is_open)
        for index in is_open[np.argsort(pool.ongoing[is_open], kind="stable")][:count]:
            pool.is_open[index] = False
            if pool.ongoing[index]:
                self._draining.add(int(index))

    def started(self, now_s: float) -> None:
        """Open a replica that was asked for."""
        self._pay(now_s)
        self._starting -= 1
        closed = [i for i in np.flatnonzero(~self._pool.is_open) if int(i) not in self._draining]
        self._pool.is_open[closed[0]] = True

    def idled(self, index: int, now_s: float) -> None:
        """Let go of a replica that drains and has nothing more to do."""
        if index in self._draining:
            self._pay(now_s)
            self._draining.discard(index)

    def paid_s(self, now_s: float) -> float:
        """Return the replica time until now."""
        self._pay(now_s)
        return self._paid_s

    def _present(self) -> int:
        return int(self._pool.is_open.sum()) + self._starting + len(self._draining)

    def _pay(self, now_s: float) -> None:
        self._paid_s += self._present() * (now_s - self._paid_until_s)
        self._paid_until_s = now_s

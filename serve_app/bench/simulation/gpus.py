"""Many bases on few GPUs in simulated time: production's policies in rounds, as Serve's controller asks them.

Owns the passing of time, and what Serve does with an answer: its delays, and its order of stopping. Requests are drawn
one after the other, without adapters. Must not decide how many replicas a base has.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_app.autoscaling.cluster import Cluster
from serve_app.autoscaling.policy import PredictedWorkPolicy, Sample, replica_report

ROUND_S = 1.0
# Over how long the arriving work is averaged.
ARRIVING_WINDOW_S = 60.0
# A base that is back so soon after it gave way came and went for nothing.
BACK_WITHIN_S = 600.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request: when it arrives, for which base, and how long it takes on a device."""

    at_s: float
    base: str
    takes_s: float


@dataclass(frozen=True, slots=True)
class Sharing:
    """The cluster and the settings of its bases; a replica takes on `max_ongoing` requests, and finishes those."""

    gpus: int
    start_s: float
    target_wait_s: float = 10.0
    max_replicas: int = 2
    downscale_delay_s: float = 300.0
    max_ongoing: int = 64


@dataclass(slots=True)
class Outcome:
    """What came of it. `waits_s` are the times in which a base had requests and no replica that ran.

    `drain_s` is the longest that a replica took to finish what it had accepted, `taken` how often some had to go for
    others, `back` how many starts were of a base that had left less than `BACK_WITHIN_S` before.
    """

    latencies_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    starts: int = 0
    back: int = 0
    taken: int = 0
    drain_s: float = 0.0
    lasted_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Replica:
    base: _Base
    is_running: bool = False
    calls: deque[Call] = field(default_factory=deque)
    drains_since_s: float | None = None
    is_drawing: bool = False

    @property
    def is_draining(self) -> bool:
        return self.drains_since_s is not None


@dataclass(slots=True)
class _Value:
    value: float


@dataclass(frozen=True, slots=True)
class _Delays:
    downscale_delay_s: float

    def model_copy(self, update: Mapping[str, float]) -> _Delays:
        return _Delays(update["downscale_delay_s"])


@dataclass(slots=True)
class _Asked:
    """Ray's context, as far as the policy reads it."""

    current_num_replicas: int
    target_num_replicas: int
    total_num_requests: float
    raw_metrics: Mapping[str, Mapping[Any, Sequence[Sample]]] | None
    config: Any
    policy_state: dict[str, Any]
    capacity_adjusted_max_replicas: int
    capacity_adjusted_min_replicas: int = 0


@dataclass(eq=False, slots=True)
class _Base:
    policy: PredictedWorkPolicy
    target: int = 0
    waiting: deque[Call] = field(default_factory=deque)
    replicas: list[_Replica] = field(default_factory=list)
    arrived: deque[Call] = field(default_factory=deque)
    state: dict[str, Any] = field(default_factory=dict)
    waits_since_s: float | None = None
    fewer_since_s: float | None = None
    left_s: float | None = None

    @property
    def running(self) -> list[_Replica]:
        return [one for one in self.replicas if one.is_running and not one.is_draining]

    @property
    def requests(self) -> int:
        return len(self.waiting) + sum(len(one.calls) for one in self.running)


class GpuSimulation:
    """One run. Time never goes back, every request is answered once, and no more GPUs are in use than there are."""

    def __init__(self, bases: Sequence[str], sharing: Sharing) -> None:
        self._sharing = sharing
        self._now_s = 0.0
        cluster = Cluster(lambda: float(sharing.gpus), clock=lambda: self._now_s)
        self._bases = {
            name: _Base(
                PredictedWorkPolicy(sharing.target_wait_s, gpus=1.0, cluster_gpus=float(sharing.gpus), cluster=cluster)
            )
            for name in bases
        }
        self._pending: deque[_Replica] = deque()
        self._used = 0
        self._events: list[tuple[float, int, Any, _Replica | None]] = []
        self._number = 0
        self.outcome = Outcome()

    def run(self, calls: Sequence[Call]) -> Outcome:
        """Play all calls, in the order of their arrival, until each is answered."""
        self._at(0.0, self._round, None)
        for call in calls:
            while self._events[0][0] <= call.at_s:
                self._next()
            self._now_s = call.at_s
            base = self._bases[call.base]
            base.waiting.append(call)
            base.arrived.append(call)
            self._hand_out(base)
        while len(self.outcome.latencies_s) < len(calls):
            self._next()
        self.outcome.lasted_s = self._now_s
        return self.outcome

    def _at(self, at_s: float, act: Any, replica: _Replica | None) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, act, replica))

    def _next(self) -> None:
        self._now_s, _, act, replica = heapq.heappop(self._events)
        act(replica)

    def _round(self, _: None) -> None:
        for base in self._bases.values():
            self._ask(base)
        self._place()
        self._at(self._now_s + ROUND_S, self._round, None)

    def _ask(self, base: _Base) -> None:
        """Do what Serve does with one base in one round."""
        if not base.running and base.requests and base.waits_since_s is None:
            base.waits_since_s = self._now_s
        delays = _Delays(self._sharing.downscale_delay_s)
        asked = _Asked(
            len(base.running), base.target, base.requests, self._reports(base), delays, base.state,
            self._sharing.max_replicas,
        )  # fmt: skip
        wanted, base.state = base.policy(asked)
        if wanted >= base.target:
            base.fewer_since_s = None
            self._follow(base, wanted)
            return
        if base.fewer_since_s is None:
            base.fewer_since_s = self._now_s
        if self._now_s - base.fewer_since_s >= asked.config.downscale_delay_s:
            base.fewer_since_s = None
            self.outcome.taken += asked.config is not delays
            self._follow(base, wanted if base.target == 1 else max(1, wanted))

    def _reports(self, base: _Base) -> Mapping[str, Mapping[Any, Sequence[Sample]]]:
        while base.arrived and base.arrived[0].at_s < self._now_s - ARRIVING_WINDOW_S:
            base.arrived.popleft()
        running = base.running
        if not running:
            return {}
        arriving = sum(call.takes_s for call in base.arrived) / ARRIVING_WINDOW_S / len(running)
        reports: dict[str, dict[Any, list[Sample]]] = {}
        for replica in running:
            report = replica_report(
                backlog_s=sum(call.takes_s for call in replica.calls),
                request_s=10.0,
                load=arriving,
                requests=len(replica.calls),
                start_s=self._sharing.start_s,
            )
            for name, value in report.items():
                reports.setdefault(name, {})[replica] = [_Value(value)]
        return reports

    def _follow(self, base: _Base, target: int) -> None:
        base.target = target
        alive = [one for one in base.replicas if not one.is_draining]
        for _ in range(target - len(alive)):
            replica = _Replica(base)
            base.replicas.append(replica)
            self._pending.append(replica)
        # Those that do not run go first, then the newest.
        for replica in sorted(alive, key=lambda one: one.is_running)[: max(0, len(alive) - target)]:
            self._stop(replica)

    def _stop(self, replica: _Replica) -> None:
        replica.drains_since_s = self._now_s
        if replica in self._pending:
            self._pending.remove(replica)
            replica.base.replicas.remove(replica)
            return
        if replica.is_running and not replica.base.running:
            replica.base.left_s = self._now_s
        if not replica.calls:
            self._end(replica)

    def _end(self, replica: _Replica) -> None:
        assert replica.drains_since_s is not None
        self.outcome.drain_s = max(self.outcome.drain_s, self._now_s - replica.drains_since_s)
        replica.base.replicas.remove(replica)
        self._used -= 1
        self._place()

    def _place(self) -> None:
        while self._pending and self._used < self._sharing.gpus:
            self._used += 1
            self.outcome.starts += 1
            self._at(self._now_s + self._sharing.start_s, self._started, self._pending.popleft())

    def _started(self, replica: _Replica) -> None:
        if replica.is_draining:
            return
        base = replica.base
        replica.is_running = True
        if len(base.running) == 1 and base.left_s is not None:
            self.outcome.back += self._now_s - self._sharing.start_s - base.left_s < BACK_WITHIN_S
        if base.waits_since_s is not None:
            self.outcome.waits_s.append(self._now_s - base.waits_since_s)
            base.waits_since_s = None
        self._hand_out(base)

    def _hand_out(self, base: _Base) -> None:
        running = base.running
        while base.waiting and running:
            replica = min(running, key=lambda one: sum(call.takes_s for call in one.calls))
            if len(replica.calls) >= self._sharing.max_ongoing:
                return
            replica.calls.append(base.waiting.popleft())
            self._draw(replica)

    def _draw(self, replica: _Replica) -> None:
        if replica.calls and not replica.is_drawing:
            replica.is_drawing = True
            self._at(self._now_s + replica.calls[0].takes_s, self._drawn, replica)

    def _drawn(self, replica: _Replica) -> None:
        self.outcome.latencies_s.append(self._now_s - replica.calls.popleft().at_s)
        replica.is_drawing = False
        self._draw(replica)
        if replica.is_draining and not replica.calls:
            self._end(replica)
        else:
            self._hand_out(replica.base)


def pinned(calls: Sequence[Call], gpus: int, start_s: float, patience_s: float) -> list[float]:
    """Return the latencies where each base has its one GPU for ever, chosen by all the work that will come.

    A GPU goes on with the base that it has loaded until another's request has waited for `patience_s`.
    """
    work: dict[str, float] = {}
    for call in calls:
        work[call.base] = work.get(call.base, 0.0) + call.takes_s
    loads, place = [0.0] * gpus, {}
    for base in sorted(work, key=lambda one: -work[one]):
        place[base] = loads.index(min(loads))
        loads[place[base]] += work[base]
    latencies: list[float] = []
    for gpu in range(gpus):
        latencies += _one_gpu([call for call in calls if place[call.base] == gpu], start_s, patience_s)
    return latencies


def _one_gpu(calls: Sequence[Call], start_s: float, patience_s: float) -> list[float]:
    queue: deque[Call] = deque()
    latencies: list[float] = []
    now_s, loaded, coming = 0.0, "", 0
    while coming < len(calls) or queue:
        if not queue:
            now_s = max(now_s, calls[coming].at_s)
        while coming < len(calls) and calls[coming].at_s <= now_s:
            queue.append(calls[coming])
            coming += 1
        call = queue[0]
        if now_s - call.at_s < patience_s:
            call = next((one for one in queue if one.base == loaded), call)
        queue.remove(call)
        now_s += call.takes_s + (start_s if call.base != loaded else 0.0)
        loaded = call.base
        latencies.append(now_s - call.at_s)
    return latencies
